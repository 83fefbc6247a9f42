"""TP2 x DP2 over two hosts: one loses power, or its cable; the run goes on, the loss is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cli
from tests.support.hosts import wait_until
from tests.support.watching import events, losses, resumed

SCRIPT = str(cli.ROOT / "launch" / "torchrun_multinode.sh")
FAULTS = str(cli.ROOT / "tests" / "support" / "faults")
NAMES = ("node-a", "node-b")
STEPS = 16
SECONDS = 600.0  # for each thing to happen, on a machine that does much else


class Job:
    """The script, started on this machine for hosts that it reaches by a stand-in for ssh."""

    def __init__(self, hosts, config: Path, *options: str) -> None:
        self.hosts, self.folder = hosts, config.parent
        self.log = self.folder / "job.log"
        self.go_on = self.folder / "full-speed"
        variables = {
            "SSH": str(hosts.ssh()),
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{FAULTS}:{cli.ROOT}",
            "OMP_NUM_THREADS": "1",
            "PACE_UNTIL": str(self.go_on),
        }
        words = [SCRIPT, "--hosts", ",".join(NAMES), *options, "--nproc", "2", str(config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, "parallel.tensor=2"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=cli.environment() | variables,
                cwd=cli.ROOT,
            )

    def wait_for(self, condition, what: str) -> None:
        def is_so() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return condition()

        wait_until(is_so, SECONDS, what)

    def wait_for_steps(self, number: int) -> None:
        self.wait_for(lambda: len(losses(self.folder / "run")) >= number, f"step {number}")

    def end(self) -> int:
        self.go_on.touch()
        code = self.process.wait(timeout=SECONDS)
        for name in NAMES:
            assert self.hosts.left_over(name) == []
        return code


@pytest.fixture
def undisturbed(configuration, tmp_path) -> float:
    """The last loss of a single process that nothing happened to."""
    path = configuration(STEPS)
    ended = cli.run("train", str(path), f"run.output_dir={tmp_path}/alone", OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    return losses(tmp_path / "alone")[STEPS]


@pytest.fixture
def job(hosts, configuration):
    started: list[Job] = []

    def start(*options: str, **resilience: float) -> Job:
        started.append(Job(hosts(*NAMES), configuration(STEPS, **resilience), *options))
        return started[0]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(timeout=60)


def test_a_host_that_loses_power_and_comes_back(job, undisturbed):
    run = job("--nnodes", "1:2", "--max-restarts", "3")
    folder = run.folder / "run"
    run.wait_for_steps(3)
    run.hosts.power_off("node-b")
    run.wait_for(lambda: any("DP1" in detail for detail in resumed(folder)), "one host goes on")
    assert "1 node of 1:2, 2 ranks: node-a; lost: node-b" in run.log.read_text()
    run.hosts.power_on("node-b")
    run.wait_for(lambda: any("DP2" in detail for detail in resumed(folder)), "both go on")
    assert "new: node-b" in run.log.read_text()
    assert run.end() == 0, run.log.read_text()
    assert losses(folder)[STEPS] == pytest.approx(undisturbed, rel=1e-5)
    print(run.log.read_text())


def test_a_host_that_is_cut_off_and_comes_back(job, undisturbed):
    run = job("--nnodes", "1:2", "--max-restarts", "3", hang_seconds=30.0)
    folder = run.folder / "run"
    run.wait_for_steps(3)
    run.hosts.cut("node-b")
    run.wait_for(lambda: any("DP1" in detail for detail in resumed(folder)), "one host goes on")
    assert "did not arrive: rank 2 on node-b, rank 3 on node-b" in run.log.read_text()
    assert [event["event"] for event in events(folder)].count("hang") == 1
    run.hosts.mend("node-b")
    run.wait_for(lambda: any("DP2" in detail for detail in resumed(folder)), "both go on")
    assert run.end() == 0, run.log.read_text()
    assert losses(folder)[STEPS] == pytest.approx(undisturbed, rel=1e-5)
    print(run.log.read_text())


def test_a_signal_to_the_script_saves_on_all_hosts(job):
    run = job("--max-restarts", "3")
    run.wait_for_steps(3)
    run.process.terminate()
    assert run.end() == 3, run.log.read_text()
    assert events(run.folder / "run")[-1]["event"] == "stopped"
    assert os.path.exists(run.folder / "run" / "checkpoints" / "latest")
