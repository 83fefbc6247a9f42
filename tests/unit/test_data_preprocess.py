"""Preprocessing: the reference's tokens for any number of workers, all or nothing, never a hang."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import sentencepiece
from tokenizers import Tokenizer as LibraryTokenizer

from litespark.data import job
from litespark.data import preprocess as preprocess_module
from litespark.data.indexed import IndexedReader
from litespark.data.manifest import manifest_path, read_manifest
from litespark.data.preprocess import PreprocessOptions, preprocess
from litespark.data.tokenizers import load_tokenizer
from litespark.data.verify import verify_shard
from litespark.errors import LitesparkError, UserError
from tests.support.data import (
    PARAGRAPHS,
    make_blocks_small,
    train_json_tokenizer,
    train_sentencepiece,
    write_jsonl,
)

ROOT = Path(__file__).parents[2]
TEXTS = [*PARAGRAPHS[:400], "", "a</s>b", *PARAGRAPHS[400:500], ""]


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    return train_json_tokenizer(tmp_path_factory.mktemp("json"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few documents, so that a small input keeps several workers busy."""
    make_blocks_small(monkeypatch)


def options(tmp_path, tokenizer, data, **changes):
    return PreprocessOptions(
        inputs=(str(data),),
        tokenizer=str(tokenizer),
        output_prefix=str(tmp_path / "out" / "p"),
        **changes,
    )


def preprocess_one(*arguments):
    (manifest,) = preprocess(*arguments).values()
    return manifest


def outputs(tmp_path):
    folder = tmp_path / "out"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def shard_documents(prefix):
    reader = IndexedReader(prefix)
    return [reader.read(i).tolist() for i in range(reader.documents)]


def run_tool(*arguments, shell_prefix=""):
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    if shell_prefix:
        command = ["bash", "-c", f'{shell_prefix}; exec "$@"', "bash", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def start_tool(tmp_path, tokenizer, data):
    """Start the tool with two workers in a process group of its own."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--workers", "2"]
    command += ["--input", str(data), "--tokenizer", str(tokenizer)]
    command += ["--output-prefix", str(tmp_path / "out" / "p")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["json", "model"])
@pytest.mark.usefixtures("small_blocks")
def test_tokens_are_the_references_for_any_worker_count(
    tmp_path, json_folder, model_folder, kind, workers
):
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    if kind == "json":
        library = LibraryTokenizer.from_file(str(json_folder / "tokenizer.json"))
        library.encode_special_tokens = True
        expected = [[*library.encode(t, add_special_tokens=False).ids, 1] for t in TEXTS]
        tokenizer = json_folder
    else:
        processor = sentencepiece.SentencePieceProcessor()
        processor.Load(str(model_folder / "tokenizer.model"))
        expected = [[*processor.encode(t), 2] for t in TEXTS]
        tokenizer = model_folder
    expected = [ids if text else [] for ids, text in zip(expected, TEXTS, strict=True)]
    preprocess(options(tmp_path, tokenizer, data, workers=workers))
    assert shard_documents(tmp_path / "out" / "p_text_document") == expected


def test_no_more_processes_than_blocks(tmp_path, json_folder, monkeypatch):
    """Each process reads the tokenizer, which takes longer than a small input."""
    pools, make = [], preprocess_module.ProcessPoolExecutor

    def recorded(processes, **options):
        pools.append(processes)
        return make(processes, **options)

    monkeypatch.setattr(preprocess_module, "ProcessPoolExecutor", recorded)
    data = write_jsonl(tmp_path / "one.jsonl", TEXTS[:1])
    preprocess_one(options(tmp_path, json_folder, data, workers=8))
    assert set(pools) == {1}


@pytest.mark.usefixtures("small_blocks")
def test_manifest_tells_what_was_done(tmp_path, json_folder):
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS[:5])
    write_jsonl(tmp_path / "in" / "sub" / "b.jsonl", ["", "x"])
    reports = []
    manifest = preprocess_one(
        options(tmp_path, json_folder, tmp_path / "in", append_eod=False),
        lambda progress: reports.append((progress.documents, progress.tokens)),
    )
    prefix = tmp_path / "out" / "p_text_document"
    assert read_manifest(prefix) == manifest == verify_shard(str(prefix)).manifest
    tokenizer = load_tokenizer(json_folder)
    tokens = sum(len(tokenizer.encode(text)) for text in [*TEXTS[:5], "x"])
    assert reports[-1] == (7, tokens)
    value = json.loads(manifest_path(prefix).read_text())
    assert value["tokenizer"] == {
        "identity": tokenizer.identity,
        "name": "tokenizer.json",
        "vocab_size": tokenizer.vocab_size,
        "eos_id": 1,
    }
    assert value["sources"] == [
        {
            "name": "in/a.jsonl",
            "size_bytes": (tmp_path / "in" / "a.jsonl").stat().st_size,
            "documents": 5,
            "sha256": hashlib.sha256((tmp_path / "in" / "a.jsonl").read_bytes()).hexdigest(),
        },
        {
            "name": "in/sub/b.jsonl",
            "size_bytes": 27,
            "documents": 2,
            "sha256": hashlib.sha256(b'{"text": ""}\n{"text": "x"}\n').hexdigest(),
        },
    ]
    files = value["files"]
    assert (files["documents"], files["empty_documents"], files["tokens"]) == (7, 1, tokens)
    for kind in ("bin", "idx"):
        content = prefix.with_suffix(f".{kind}").read_bytes()
        assert files[f"{kind}_bytes"] == len(content)
        assert files[f"{kind}_sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.usefixtures("small_blocks")
def test_bad_lines_are_skipped_counted_and_limited(tmp_path, json_folder):
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS[:60])
    lines = data.read_bytes().split(b"\n")
    lines[3:3] = [b"not json", b'{"other": 1}']
    lines[50:50] = [b'{"text": null}']
    data.write_bytes(b"\n".join(lines))
    last = []
    manifest = preprocess_one(
        options(tmp_path, json_folder, data, workers=2, on_error="skip", max_errors=3), last.append
    )
    assert (manifest.skipped_bad_lines, manifest.files.documents) == (3, 60)
    assert [bad.line for bad in last[-1].bad_lines] == [4, 5, 51]
    with pytest.raises(UserError, match="line number 3, more than --max-errors 2") as caught:
        preprocess(
            options(tmp_path, json_folder, data, on_error="skip", max_errors=2, overwrite=True)
        )
    assert caught.value.where == f"{data}:51"
    with pytest.raises(UserError) as caught:
        preprocess(options(tmp_path, json_folder, data, workers=2, overwrite=True))
    assert caught.value.where == f"{data}:4"
    # The two failures left the first shard as it was.
    assert verify_shard(str(tmp_path / "out" / "p_text_document")).manifest == manifest
    assert len(outputs(tmp_path)) == 4
    listed = (tmp_path / "out" / "p_quarantine.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{data}:{n}" for n in (4, 5, 51)]


def test_lone_surrogate_is_replaced_and_counted(tmp_path, json_folder):
    data = tmp_path / "a.jsonl"
    data.write_bytes(b'{"text": "a\\ud809b"}\n')
    manifest = preprocess_one(options(tmp_path, json_folder, data, append_eod=False))
    assert manifest.replaced_surrogates == 1
    ids = shard_documents(tmp_path / "out" / "p_text_document")[0]
    assert load_tokenizer(json_folder).decode(ids) == "a\ufffdb"


def test_existing_output_is_kept_unless_told(tmp_path, json_folder):
    data = write_jsonl(tmp_path / "a.jsonl", ["one"])
    first = preprocess_one(options(tmp_path, json_folder, data))
    write_jsonl(data, ["two", "three"])
    with pytest.raises(UserError, match="--overwrite"):
        preprocess(options(tmp_path, json_folder, data))
    assert verify_shard(str(tmp_path / "out" / "p_text_document")).manifest == first
    preprocess(options(tmp_path, json_folder, data, overwrite=True))
    second = verify_shard(str(tmp_path / "out" / "p_text_document")).manifest
    assert second is not None
    assert second.files.documents == 2


def test_wrong_options_are_refused(tmp_path, json_folder):
    data = write_jsonl(tmp_path / "a.jsonl", ["one"])
    no_eos = train_json_tokenizer(tmp_path / "no_eos", eos=None)
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    for given, message in [
        (options(tmp_path, no_eos, data), "no end-of-text"),
        (options(tmp_path, json_folder, data, workers=0), "below 1"),
        (options(tmp_path, json_folder, data, max_errors=-1), "negative"),
        (options(tmp_path, json_folder, data, json_keys=("a/b",)), "file name"),
        (options(tmp_path, json_folder, empty), "2 documents and no token"),
    ]:
        with pytest.raises(UserError, match=message):
            preprocess(given)
        assert outputs(tmp_path) == []
    preprocess(options(tmp_path, no_eos, data, append_eod=False))


@pytest.mark.usefixtures("small_blocks")
def test_killed_worker_ends_the_job_in_seconds(tmp_path, json_folder, monkeypatch):
    monkeypatch.setattr(job, "COMMIT_SECONDS", float("inf"))  # else the work is kept for --resume
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    killed = []

    def kill_one(progress):
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(LitesparkError, match="process died") as caught:
        preprocess(options(tmp_path, json_folder, data, workers=2), kill_one)
    assert time.monotonic() - started < 120
    assert caught.value.exit_code == 1
    assert outputs(tmp_path) == []
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_job_and_removes_what_it_wrote(tmp_path, json_folder, number, code):
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS * 300)
    process = start_tool(tmp_path, json_folder, data)
    wait_for(lambda: any(p.stat().st_size for p in (tmp_path / "out").glob("p.partial/*.bin")))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C, to the workers too
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    left = outputs(tmp_path)
    # A machine so slow that COMMIT_SECONDS have passed has committed work, which stays.
    journal = tmp_path / "out" / "p.partial" / "journal.jsonl"
    assert left == [] or (left == ["p.partial"] and journal.stat().st_size)


def test_workers_go_when_the_parent_is_killed(tmp_path, json_folder):
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS * 300)
    parent = start_tool(tmp_path, json_folder, data)

    def spawned():
        children = psutil.Process(parent.pid).children()
        return [child for child in children if "spawn_main" in str(child.cmdline())]

    wait_for(lambda: len(spawned()) == 2)
    workers = spawned()
    time.sleep(0.5)  # let them begin
    parent.kill()
    parent.communicate(timeout=120)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []
    assert outputs(tmp_path) == ["p.partial"]


class TestCommand:
    """The tool as a process: exit codes, messages, Megatron-LM's flags."""

    def test_megatron_flags_and_two_keys(self, tmp_path, model_folder):
        data = tmp_path / "a.jsonl"
        data.write_text(json.dumps({"text": "the text", "title": "its title"}) + "\n")
        done = run_tool(
            *("--input", data, "--output-prefix", tmp_path / "out" / "p", "--workers", 1),
            *("--json-keys", "text", "title", "--append-eod", "--partitions", 2),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model_folder),
        )
        assert done.returncode == 0, done.stderr
        assert "documents  1 (0 empty) from 1 files" in done.stdout
        assert "--partitions 2 has no effect" in done.stderr
        tokenizer = load_tokenizer(model_folder)
        for key, text in (("text", "the text"), ("title", "its title")):
            documents = shard_documents(tmp_path / "out" / f"p_{key}_document")
            assert documents == [[*tokenizer.encode(text), 2]]

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"text": "a"', "not valid JSON"),
            ('{"x": 1}', "no key 'text'"),
            ('{"text": null}', "null"),
        ],
    )
    def test_bad_line_exits_with_2_and_names_it(self, tmp_path, json_folder, line, problem):
        data = tmp_path / "a.jsonl"
        data.write_text('{"text": "fine"}\n' * 3 + line + '\n{"text": "fine"}\n')
        done = run_tool(
            *(
                "--input",
                data,
                "--tokenizer",
                json_folder,
                "--output-prefix",
                tmp_path / "out" / "p",
            )
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"litespark: error: {data}:4: ")
        assert problem in done.stderr
        assert "Traceback" not in done.stderr
        assert outputs(tmp_path) == []

    def test_skipped_lines_are_reported_at_the_end(self, tmp_path, json_folder):
        data = tmp_path / "a.jsonl"
        data.write_text('{"text": "fine"}\nbroken\n')
        done = run_tool(
            *("--input", data, "--tokenizer", json_folder, "--on-error", "skip"),
            *("--output-prefix", tmp_path / "out" / "p"),
        )
        assert done.returncode == 0
        assert "skipped 1 bad lines, listed in" in done.stdout
        assert f"the first of them:\n  {data}:2: the line is not" in done.stdout

    def test_full_disk_exits_with_1_and_leaves_nothing(self, tmp_path, json_folder):
        # A limit on the size of a file stops the same write that a full disk would.
        data = write_jsonl(tmp_path / "a.jsonl", TEXTS)
        done = run_tool(
            *(
                "--input",
                data,
                "--tokenizer",
                json_folder,
                "--output-prefix",
                tmp_path / "out" / "p",
            ),
            shell_prefix="ulimit -f 20",
        )
        assert done.returncode == 1
        assert "cannot be written: File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert outputs(tmp_path) == []

    @pytest.mark.parametrize(
        ("flags", "problem"),
        [
            (["--tokenizer-type", "GPT2BPETokenizer"], "is not supported"),
            (["--tokenizer-type", "Llama2Tokenizer"], "no such file"),
        ],
    )
    def test_wrong_tokenizer_type_exits_with_2(self, tmp_path, json_folder, flags, problem):
        data = write_jsonl(tmp_path / "a.jsonl", ["x"])
        done = run_tool(
            *("--input", data, "--tokenizer-model", json_folder, "--output-prefix", tmp_path / "p"),
            *flags,
        )
        assert done.returncode == 2
        assert problem in done.stderr

    def test_help_is_quick_and_imports_nothing_heavy(self):
        code = (
            "import argparse, sys\n"
            "from litespark.cli.preprocess import add_parser\n"
            "parser = argparse.ArgumentParser()\n"
            "add_parser(parser.add_subparsers())\n"
            "text = parser._subparsers._group_actions[0].choices['preprocess'].format_help()\n"
            "assert '--output-prefix' in text and '%' not in text\n"
            "heavy = {'torch', 'numpy', 'tokenizers', 'sentencepiece', 'rich'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
