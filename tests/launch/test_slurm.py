"""A real Slurm: trained, preempted, queued again, resumed, ended; cancelled without a trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.support import cli
from tests.support.hosts import wait_until
from tests.support.slurm import Slurm, slurm, why_not
from tests.support.watching import events, losses, resumed

SCRIPT = "launch/slurm.sbatch"
STEPS = 14
SECONDS = 900.0

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture
def cluster(hosts, tmp_path) -> Iterator[Slurm]:
    with slurm(hosts("head", "node1", "node2"), tmp_path / "slurm") as made:
        yield made


class Job:
    def __init__(self, cluster: Slurm, config, *options: str) -> None:
        self.cluster, self.folder = cluster, config.parent / "run"
        self.log, self.go_on = config.parent / "job.log", config.parent / "full-speed"
        faults = cli.ROOT / "tests" / "support" / "faults"
        variables = {
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{faults}:{cli.ROOT}",
            "PACE_UNTIL": str(self.go_on),
        }
        nodes = ["--nodes=2", "--ntasks-per-node=2", f"--output={self.log}", *options]
        words = [*nodes, SCRIPT, str(config), "parallel.tensor=2"]
        self.number = cluster.submit(*words, **variables)

    def wait_for(self, condition, what: str) -> None:
        try:
            wait_until(condition, SECONDS, what)
        except AssertionError as error:
            text = self.log.read_text() if self.log.exists() else "no log"
            raise AssertionError(f"{error}\n{self.state()}\n{text}") from None

    def wait_for_steps(self, number: int) -> None:
        self.wait_for(lambda: len(losses(self.folder)) >= number, f"step {number}")

    def start_soon(self) -> None:
        """Slurm lets a job that goes back wait for two minutes; a user need not.

        But within the second in which it ended, Slurm takes the new start for the old one
        ("Job credential revoked") and gives the job up.
        """
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+5")

    def state(self) -> str:
        return self.cluster.job(self.number, "JobState")

    def restarts(self) -> int:
        return int(self.cluster.job(self.number, "Restarts"))


def test_queued_again_before_the_limit_and_after_preemption(cluster, configuration):
    job = Job(cluster, configuration(STEPS), "--time=60")
    job.wait_for_steps(3)
    # What --signal=B:USR1@300 has Slurm send five minutes before the limit.
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_for(lambda: job.restarts() == 1, "back in the queue")
    job.start_soon()
    job.wait_for(lambda: len(resumed(job.folder)) == 1, "resumed")
    job.wait_for_steps(6)

    urgent = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=2")
    cluster.submit(*urgent, "--output=/dev/null", "--wrap", "srun sleep 2")
    job.wait_for(lambda: job.restarts() == 2, "preempted")
    job.start_soon()
    job.wait_for(lambda: len(resumed(job.folder)) == 2, "resumed again")
    job.go_on.touch()
    job.wait_for(lambda: job.state() == "COMPLETED", "done")
    assert max(losses(job.folder)) == STEPS
    kinds = [event["event"] for event in events(job.folder)]
    assert kinds.count("stopped") == 2, "each time the state was saved"
    print(job.log.read_text())


def test_cancelling_leaves_nothing_behind(cluster, configuration):
    job = Job(cluster, configuration(STEPS))
    job.wait_for_steps(3)
    cluster.run("scancel", job.number)
    job.wait_for(lambda: job.state() == "CANCELLED", "cancelled")
    job.wait_for(lambda: cluster.states() == {"idle"}, "the nodes are free")
    for node in cluster.nodes:
        assert [line for line in cluster.hosts.left_over(node) if "litespark" in line] == []
    assert job.restarts() == 0
    print(job.log.read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "CONFIG is missing"),
        (["--nodes", "2", "run.yaml"], "CONFIG comes first"),
        (["no-such.yaml"], "no-such.yaml: cannot be read"),
    ],
)
def test_mistakes(arguments, words, cluster, tmp_path):
    log = tmp_path / "job.log"
    number = cluster.submit(f"--output={log}", SCRIPT, *arguments, PYTHON=sys.executable)
    wait_until(lambda: cluster.job(number, "JobState") == "FAILED", SECONDS, "failed")
    assert cluster.job(number, "ExitCode") == "2:0"
    assert words in log.read_text()
