"""Ranks that die, hang or freeze, for real: what the user reads, the exit code, and the restart."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.support import cli
from tests.support.runs import config_tree, write_shard

pytestmark = pytest.mark.distributed

FAULTS = str(Path(__file__).parents[1] / "support" / "faults")
STEPS = 12


@pytest.fixture
def train(tmp_path):
    """`litespark train` of a small run, a fault planted in one rank; the process and its folder."""
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["training"].update(steps=STEPS, save_every=2, log_every=1)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))

    def train(*arguments: str, fault: str = "", rank: int = 1, at: int = 21, name: str = "run"):
        folder = tmp_path / name
        variables = {
            "PYTHONPATH": f"{FAULTS}:{cli.ROOT}",
            "FAULT": fault,
            "FAULT_RANK": str(rank) if fault else "none",
            "FAULT_PASS": str(at),
            "FAULT_ONCE": str(tmp_path / f"{name}.fault"),
        }
        options = [f"run.output_dir={folder}", *arguments]
        ended = cli.run("train", str(path), *options, **variables)
        return ended, folder

    return train


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def events(folder: Path) -> list[str]:
    return [
        json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()
    ]


def seconds_since(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def test_a_killed_rank_is_named_and_the_run_starts_again(train, tmp_path):
    """With the losses of an undisturbed run, bit for bit."""
    layout = ["--nproc", "2", "parallel.tensor=2"]
    whole, whole_folder = train(*layout, name="whole")
    assert whole.returncode == 0, whole.stderr
    ended, folder = train(*layout, "--max-restarts", "1", fault="kill")
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 was ended by SIGKILL" in ended.stderr
    assert "restart 1 of 1" in ended.stderr
    assert "resumed" in events(folder)
    assert losses(folder) == losses(whole_folder)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2", "seed=1"])
def test_a_killed_rank_ends_the_others(layout, train, tmp_path):
    ended, _ = train("--nproc", "2", layout, fault="kill")
    assert ended.returncode == 1, ended.stderr
    assert "rank 1 was ended by SIGKILL" in ended.stderr
    assert seconds_since(tmp_path / "run.fault") < 120


def test_the_last_words_of_a_rank_are_heard(train, tmp_path):
    ended, _ = train("--nproc", "2", fault="raise")
    assert ended.returncode == 1, ended.stderr
    assert "the dog ate the gradients" in ended.stderr
    assert seconds_since(tmp_path / "run.fault") < 120


@pytest.mark.parametrize("fault", ["sleep", "stop"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hang_names_the_rank_that_did_not_arrive(fault, rank, train, tmp_path):
    """A rank that sleeps tells where; one that is frozen does not answer, and is killed."""
    options = ["--nproc", "2", "parallel.tensor=2", "resilience.hang_seconds=10"]
    ended, folder = train(*options, fault=fault, rank=rank)
    assert ended.returncode == 4, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "the run hangs" in last
    assert f"did not arrive: rank {rank} on" in last
    report = (folder / "hang.txt").read_text()
    if fault == "sleep":
        assert f"rank {rank} (process" in report
        assert "time.sleep(600)" in report
        assert "time.sleep(600)" in ended.stderr
    else:
        assert "no answer" in report
    other = next(line for line in report.splitlines() if line.startswith(f"rank {1 - rank} "))
    assert "micro-batch 1, forward and backward" in other
    assert events(folder)[-1] == "hang"


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_slow_disk_is_no_hang(asynchronous, train, tmp_path, monkeypatch):
    """One rank writes for 16 s; the other, and the next save, wait for twice `hang_seconds`."""
    monkeypatch.setenv("FAULT_PLACE", "save")
    options = ["--nproc", "2", "resilience.hang_seconds=8"]
    ended, folder = train(*options, f"checkpoint.asynchronous={asynchronous}", fault="slow")
    assert ended.returncode == 0, ended.stderr
    assert seconds_since(tmp_path / "run.fault") > 15, "it was not slow"
    assert max(losses(folder)) == STEPS
    assert not (folder / "hang.txt").exists()


def test_a_rank_that_freezes_in_a_save_is_a_hang(train, monkeypatch):
    """The other waits for its disk, which is no hang, but hears nothing of it any more."""
    monkeypatch.setenv("FAULT_PLACE", "save")
    options = ["--nproc", "2", "resilience.hang_seconds=10", "checkpoint.asynchronous=false"]
    ended, folder = train(*options, fault="stop")
    assert ended.returncode == 4, ended.stderr
    assert "did not arrive: rank 1 on" in ended.stderr.strip().splitlines()[-1]
    assert not list((folder / "checkpoints").glob("step_*")), "no rank alone can name it"


def test_a_hang_is_started_again(train):
    options = ["--nproc", "2", "resilience.hang_seconds=10", "--max-restarts", "1"]
    ended, folder = train(*options, fault="sleep")
    assert ended.returncode == 0, ended.stderr
    assert "restart 1 of 1" in ended.stderr
    assert max(losses(folder)) == STEPS


def test_one_process_that_hangs(train, monkeypatch):
    monkeypatch.setenv("FAULT_ALONE", "0")
    ended, folder = train("resilience.hang_seconds=8", fault="sleep", rank=0)
    assert ended.returncode == 4, ended.stderr
    assert "did not arrive: rank 0" in ended.stderr.strip().splitlines()[-1]
    assert "time.sleep(600)" in (folder / "hang.txt").read_text()


def test_mistakes_and_guards_are_not_repeated(train):
    ended, _ = train(
        "--nproc", "2", "--max-restarts", "3", "optimizer.lr=1e30", "optimizer.clip_grad=0"
    )
    assert ended.returncode == 4, ended.stderr
    assert "restart" not in ended.stderr
    ended, _ = train("--nproc", "2", "--max-restarts", "3", "parallel.tensor=3", name="wrong")
    assert ended.returncode == 2, ended.stderr
    assert "restart" not in ended.stderr


def test_restarts_belong_to_the_launcher(train):
    ended, _ = train("--max-restarts", "-1")
    assert ended.returncode == 2
    assert "--max-restarts -1" in ended.stderr
