"""Each fault that makes Megatron-LM's tools hang or lose documents ends our process, reported.

Every case is a process as a user starts it.  `_HANG_SECONDS` catches a hang and measures nothing:
10 s, and as much again for starting Python on a busy machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from litespark.data.indexed import IndexedReader
from litespark.data.verify import verify_shard
from tests.support.data import PARAGRAPHS, train_json_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
_HANG_SECONDS = 120
GOOD = b'{"text": "fine"}\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_json_tokenizer(tmp_path_factory.mktemp("json"))


def start(tmp_path, tokenizer, data, *more, workers=2, limit_file_blocks=None):
    command = [sys.executable, "-m", "litespark", "preprocess", "--workers", str(workers)]
    command += ["--input", str(data), "--tokenizer", str(tokenizer), *more]
    command += ["--output-prefix", str(tmp_path / "out" / "p")]
    if limit_file_blocks is not None:
        command = ["bash", "-c", f'ulimit -f {limit_file_blocks}; exec "$@"', "bash", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process):
    """Return (exit code, standard output, standard error); a hang fails the test."""
    try:
        output, errors = process.communicate(timeout=_HANG_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert "Traceback" not in errors
    return process.returncode, output, errors


def outputs(tmp_path):
    folder = tmp_path / "out"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def documents(tmp_path):
    prefix = tmp_path / "out" / "p_text_document"
    verify_shard(str(prefix))
    return IndexedReader(prefix).documents


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut sho', "not valid JSON"),
        (b'{"other": "x"}', "no key 'text'"),
        (b'{"text": null}', "is null, not a string"),
        (b'{"text": "\xff"}', "not valid JSON"),
    ],
    ids=["bad line", "missing key", "null text", "not UTF-8"],
)
def test_bad_line_stops_the_job_or_is_skipped_and_counted(tmp_path, tokenizer, line, problem):
    data = tmp_path / "a.jsonl"
    data.write_bytes(GOOD * 20 + line + b"\n" + GOOD * 20)
    code, _, errors = end(start(tmp_path, tokenizer, data))
    assert code == 2
    assert errors.startswith(f"litespark: error: {data}:21: ")
    assert problem in errors
    assert outputs(tmp_path) == []
    code, output, _ = end(start(tmp_path, tokenizer, data, "--on-error", "skip"))
    assert code == 0
    assert "skipped 1 bad lines" in output
    assert documents(tmp_path) == 40
    assert f"{data}:21: " in (tmp_path / "out" / "p_quarantine.txt").read_text()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": ""}', "documents  41 (1 empty)"),
        (b'{"text": "a\\ud808b"}', "replaced 1 lone surrogates by U+FFFD"),
    ],
    ids=["empty text", "lone surrogate"],
)
def test_odd_text_is_kept_and_reported(tmp_path, tokenizer, line, told):
    data = tmp_path / "a.jsonl"
    data.write_bytes(GOOD * 20 + line + b"\n" + GOOD * 20)
    code, output, _ = end(start(tmp_path, tokenizer, data))
    assert code == 0
    assert told in output
    assert documents(tmp_path) == 41


def reads(process):
    """Whether a process writes into the memory from which the tokenizing ones take text."""
    maps = process.memory_maps(grouped=False)
    return any("litespark-blocks" in one.path and one.perms == "rw-s" for one in maps)


@pytest.mark.parametrize("workers", [2, 4])
def test_killed_process_ends_the_job(tmp_path, tokenizer, workers):
    """One that tokenizes, and where there is one the reader."""
    data = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS * 60 * workers)
    process = start(tmp_path, tokenizer, data, workers=workers)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in (tmp_path / "out").glob("p.partial/*.bin")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    children = psutil.Process(process.pid).children()
    spawned = [child for child in children if "spawn_main" in str(child.cmdline())]
    victims = [child for child in spawned if reads(child) == (workers == 4)]
    victims[0].send_signal(signal.SIGKILL)
    code, _, errors = end(process)
    assert code == 1
    assert "tokenizing process died" in errors
    assert not [name for name in outputs(tmp_path) if name != "p.partial"]


def test_full_disk_ends_the_process(tmp_path, tokenizer):
    # A limit on the size of a file stops the same write that a full disk would.
    data = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS * 8)
    code, _, errors = end(start(tmp_path, tokenizer, data, limit_file_blocks=200))
    assert code == 1
    assert "cannot be written: File too large" in errors
    assert outputs(tmp_path) == []


def test_source_name_that_no_manifest_can_hold_is_refused_at_the_start(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/a\xff.jsonl", "wb") as file:
        file.write(GOOD)
    code, _, errors = end(start(tmp_path, tokenizer, tmp_path / "in"))
    assert code == 2
    assert "a\\xff.jsonl" in errors
    assert "not UTF-8" in errors
    assert outputs(tmp_path) == []
