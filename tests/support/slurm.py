"""A small real Slurm: slurmctld on host `head`, a slurmd on every other of `hosts`, and a munged.

All files are in one folder, all ports in the hosts' own network; nothing of the machine's is used
or changed.  Needs the packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.hosts import Hosts, wait_until

_CONFIGURATION = """\
ClusterName=litespark
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
MinJobAge=600
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
NodeName=DEFAULT CPUs=4 RealMemory=4000 State=UNKNOWN
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 OverSubscribe=EXCLUSIVE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF OverSubscribe=EXCLUSIVE
"""


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    missing = [
        tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool) is None
    ]
    if missing:
        return f"there is no {', '.join(missing)} (packages slurmctld, slurmd, slurm-client, munge)"
    return None


class Slurm:
    """Runs Slurm's commands on `head`."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.nodes = [name for name in hosts.names if name != "head"]
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.munged: subprocess.Popen[bytes] | None = None

    def build(self) -> None:
        """Write the configuration, start the daemons, wait for the nodes."""
        nodes = "\n".join(f"NodeName={n} NodeAddr={self.hosts.address(n)}" for n in self.nodes)
        text = _CONFIGURATION.format(
            head=self.hosts.address("head"), folder=self.folder, nodes=nodes
        )
        (self.folder / "slurm.conf").write_text(text)
        # Named, as a slurmd that finds none mounted gives up; nothing here uses control groups.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": key,
            "log-file": self.folder / "munge.log",
            "pid-file": self.folder / "munge.pid",
            "seed-file": self.folder / "munge.seed",
            "socket": self.folder / "munge.socket",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        # --force: the folder of a test may be open to more people than munge likes.
        self.munged = subprocess.Popen(
            ["munged", "--foreground", "--force", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until((self.folder / "munge.socket").exists, 20, "munged")
        self._start("head", "slurmctld", "-D")
        for name in self.nodes:
            self._start(name, "slurmd", "-D", "-N", name)
        wait_until(lambda: self.states() == {"idle"}, 60, f"the nodes, {self.states()}")

    def states(self) -> set[str]:
        """The states in which nodes are."""
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())

    def run(self, *words: str, check: bool = True, **variables: str) -> str:
        """What a command on `head` prints."""
        process = self.hosts.start("head", *words, **(self.variables | variables))
        out, _ = process.communicate(timeout=120)
        assert not check or process.returncode == 0, f"{words}: {out}"
        return out

    def submit(self, *words: str, **variables: str) -> str:
        """`sbatch`; returns the job's number."""
        return self.run("sbatch", "--parsable", *words, **variables).strip()

    def job(self, number: str, field: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(part.partition("=")[::2] for part in shown.split())[field]

    def tear_down(self) -> None:
        """End munged; the hosts end the rest."""
        if self.munged is not None:
            self.munged.terminate()
            self.munged.wait()

    def _start(self, host: str, *words: str) -> None:
        process = self.hosts.start(host, *words, **self.variables)
        # Their words are in their logs; a full pipe would stop them.
        process.stdout.close()  # type: ignore[union-attr]


@contextmanager
def slurm(hosts: Hosts, folder: Path) -> Iterator[Slurm]:
    """A Slurm for the length of a `with` block."""
    folder.mkdir()
    made = Slurm(hosts, folder)
    try:
        made.build()
        yield made
    finally:
        made.tear_down()
