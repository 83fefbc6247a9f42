"""A job that is killed at any moment and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from litespark.data import job as job_module
from litespark.data import parquet as parquet_module
from litespark.data import preprocess as module
from litespark.data.manifest import read_manifest
from litespark.data.options import PreprocessOptions
from litespark.data.preprocess import preprocess
from litespark.data.work import WorkFolder
from litespark.errors import LitesparkError, UserError
from tests.support.data import PARAGRAPHS, make_blocks_small, train_json_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
SETS = ["RedPajamaC4", "RedPajamaBook", "RedPajamaGithub"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_json_tokenizer(tmp_path_factory.mktemp("json"))


@pytest.fixture
def data(tmp_path):
    """Three files of documents of three sub-sources, with bad lines among them."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        lines = [
            json.dumps({"text": text, "meta": {"redpajama_set_name": SETS[i % 3]}})
            for i, text in enumerate(PARAGRAPHS[number * 100 : number * 100 + 100])
        ]
        lines[number * 7 + 3] = "broken"
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def commits(monkeypatch):
    """Small blocks, and a commit after each."""
    make_blocks_small(monkeypatch)
    monkeypatch.setattr(job_module, "COMMIT_SECONDS", 0.0)


def options(data, tokenizer, prefix, **changes):
    given: dict[str, Any] = {"on_error": "skip", "split_by": "meta.redpajama_set_name"} | changes
    return PreprocessOptions((str(data),), str(tokenizer), str(prefix), **given)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Stop(Exception):
    """Stands for a kill: nothing of the job's own clean-up may matter."""


def run_until(given, blocks):
    """Run a job that dies after some blocks, leaving its folder as a kill would."""

    def report(progress):
        nonlocal blocks
        blocks -= 1
        if blocks == 0:
            raise Stop

    with pytest.raises(Stop):
        preprocess(given, report)


@pytest.mark.usefixtures("commits")
def test_resumed_job_ends_with_the_same_bytes(tmp_path, data, tokenizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    preprocess(options(data, tokenizer, whole / "p"))
    # Stopped again and again, with another number of workers each time.
    for blocks, workers in ((1, 1), (4, 4), (9, 1)):  # by four the reader is another process
        run_until(options(data, tokenizer, parts / "p", resume=True, workers=workers), blocks)
        assert [path.name for path in parts.iterdir()] == ["p.partial"]
    said = []
    preprocess(options(data, tokenizer, parts / "p", resume=True, workers=2), say=said.append)
    assert contents(parts) == contents(whole)
    assert len(contents(whole)) == 3 * 3 + 1
    assert "going on after" in said[0]


@pytest.mark.usefixtures("commits")
def test_resumed_parquet_ends_with_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    """Rows have no lines to count; the place in the input is that of the blocks made of them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet_module, "_ROWS_AT_ONCE", 16)
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        texts = [None if i == 40 else PARAGRAPHS[number * 100 + i] for i in range(100)]
        meta = [{"redpajama_set_name": SETS[i % 3]} for i in range(100)]
        table = pyarrow.table({"text": texts, "meta": meta})
        parquet.write_table(table, folder / f"{number}.parquet", row_group_size=30)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    preprocess(options(folder, tokenizer, whole / "p"))
    for blocks in (3, 6):
        run_until(options(folder, tokenizer, parts / "p", resume=True), blocks)
        assert [path.name for path in parts.iterdir()] == ["p.partial"]
    said = []
    preprocess(options(folder, tokenizer, parts / "p", resume=True, workers=2), say=said.append)
    assert "going on after" in said[0]
    assert contents(parts) == contents(whole)
    assert contents(whole)["p_quarantine.txt"].count(b"\n") == 2


@pytest.mark.usefixtures("commits")
def test_what_a_kill_left_beyond_the_last_commit_is_cut_off(tmp_path, data, tokenizer):
    preprocess(options(data, tokenizer, tmp_path / "whole" / "p"))
    parts = tmp_path / "parts"
    run_until(options(data, tokenizer, parts / "p"), 6)
    for path in (parts / "p.partial").iterdir():
        if path.suffix in (".bin", ".lengths", ".txt"):
            with open(path, "ab") as file:
                file.write(b"torn")
    with open(parts / "p.partial" / "journal.jsonl", "ab") as file:
        file.write(b'{"kind": "commit", "sour')
    preprocess(options(data, tokenizer, parts / "p", resume=True))
    assert contents(parts) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("commits")
def test_kill_among_the_renames_is_finished(tmp_path, data, tokenizer, monkeypatch):
    preprocess(options(data, tokenizer, tmp_path / "whole" / "p"))
    parts = tmp_path / "parts"
    replace, left = os.replace, [15]

    def fail_late(source, target):
        left[0] -= str(target).startswith(str(parts / "p_"))
        if left[0] == 9:
            raise Stop
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail_late)
        with pytest.raises(Stop):
            preprocess(options(data, tokenizer, parts / "p"))
    assert 0 < len(contents(parts)) < 10
    for path in parts.glob("*.idx"):  # whoever sees an index sees all of its shard
        assert path.with_suffix(".bin").exists()
        assert read_manifest(path.with_suffix("")) is not None
    preprocess(options(data, tokenizer, parts / "p", resume=True))
    assert contents(parts) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("commits")
def test_changed_options_and_inputs_are_refused_and_the_work_stays(tmp_path, data, tokenizer):
    prefix = tmp_path / "out" / "p"
    run_until(options(data, tokenizer, prefix), 5)
    before = contents(tmp_path / "out" / "p.partial")
    other = train_json_tokenizer(tmp_path / "other", vocab_size=500)
    for given, message in [
        (options(data, tokenizer, prefix, resume=True, append_eod=False), "append_eod"),
        (options(data, tokenizer, prefix, resume=True, split_by=None), "split_by"),
        (options(data, other, prefix, resume=True), "tokenizer_sha256"),
    ]:
        with pytest.raises(UserError, match=message):
            preprocess(given)
    os.utime(data / "1.jsonl", ns=(1, 1))
    with pytest.raises(UserError, match=r"1.jsonl, changed"):
        preprocess(options(data, tokenizer, prefix, resume=True))
    assert contents(tmp_path / "out" / "p.partial") == before


@pytest.mark.usefixtures("commits")
def test_job_stopped_by_a_bad_line_goes_on_with_skip(tmp_path, data, tokenizer):
    preprocess(options(data, tokenizer, tmp_path / "whole" / "p"))
    parts = tmp_path / "parts"
    first = data / "0.jsonl"
    lines = first.read_text().splitlines(keepends=True)
    lines.insert(60, lines.pop(3))  # later, so that something is committed before it
    first.write_text("".join(lines))
    with pytest.raises(UserError, match="not valid JSON"):
        preprocess(options(data, tokenizer, parts / "p", on_error="stop"))
    preprocess(options(data, tokenizer, parts / "p", resume=True))
    assert contents(parts)["p_quarantine.txt"].count(b"\n") == 3


@pytest.mark.usefixtures("commits")
def test_without_resume_old_work_is_removed_and_said_to_be(tmp_path, data, tokenizer):
    prefix = tmp_path / "out" / "p"
    run_until(options(data, tokenizer, prefix), 5)
    said = []
    preprocess(options(data, tokenizer, prefix), say=said.append)
    assert "was removed" in said[0]
    assert not (tmp_path / "out" / "p.partial").exists()


def test_two_processes_never_write_one_output(tmp_path, data, tokenizer):
    (tmp_path / "out").mkdir()
    held = WorkFolder(str(tmp_path / "out" / "p"))
    with pytest.raises(UserError, match="another process"):
        preprocess(options(data, tokenizer, tmp_path / "out" / "p", resume=True))
    held.release(keep=False)
    preprocess(options(data, tokenizer, tmp_path / "out" / "p", resume=True))


SCRIPT = """
import sys
import time
from litespark.data import job
from litespark.data.options import PreprocessOptions
from litespark.data.preprocess import preprocess
job.COMMIT_SECONDS = 0.0
commit = job.Job._commit
def commit_slowly(self):
    commit(self)
    time.sleep(0.5)  # so that the kill meets it
job.Job._commit = commit_slowly
if __name__ == "__main__":
    preprocess(PreprocessOptions((sys.argv[1],), sys.argv[2], sys.argv[3], workers=2, resume=True))
"""


def test_killed_outright_and_resumed(tmp_path, tokenizer):
    data = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS * 12)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    preprocess(PreprocessOptions((str(data),), str(tokenizer), str(tmp_path / "whole" / "p")))
    command = [sys.executable, str(script), str(data), str(tokenizer)]
    command.append(str(tmp_path / "parts" / "p"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    journal = tmp_path / "parts" / "p.partial" / "journal.jsonl"
    kills = 0
    for wanted in (1, 3):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"commit") >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.005)
    assert kills  # else nothing was tested
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("commits")
def test_full_disk_keeps_what_was_committed(tmp_path, data, tokenizer, monkeypatch):
    preprocess(options(data, tokenizer, tmp_path / "whole" / "p"))
    calls = [0]
    take = job_module.Job.take

    def full(self, block, result):
        calls[0] += 1
        if calls[0] == 6:
            raise OSError(28, "No space left on device")
        take(self, block, result)

    monkeypatch.setattr(module.Job, "take", full)
    with pytest.raises(LitesparkError, match=r"No space left.*--resume to go on") as caught:
        preprocess(options(data, tokenizer, tmp_path / "parts" / "p"))
    assert caught.value.exit_code == 1
    monkeypatch.setattr(module.Job, "take", take)
    preprocess(options(data, tokenizer, tmp_path / "parts" / "p", resume=True))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
