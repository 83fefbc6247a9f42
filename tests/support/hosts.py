"""Several "hosts" on one machine: network namespaces with addresses, names and cables of their own.

A host has one interface, eth0, on a common switch (a bridge).  A command on it sees its own
hostname, /etc/hosts and processes; the file system is everybody's, as a cluster's would be.  As on
Debian, a host's own name resolves to 127.0.1.1 on itself.  Needs root and iproute2.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.cli import ROOT, environment

# No name server: a name is in /etc/hosts or is not known, at once.
_ENTER = """
mount --bind "$1" /etc/hosts && mount --bind /dev/null /etc/resolv.conf && hostname "$2" || exit 70
shift 2
exec "$@"
"""


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nsenter", "unshare", "mount", "hostname"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (packages iproute2, util-linux)"
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}"


class Hosts:
    """Hosts on one switch; `names` in order have the addresses 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self.tag = f"ls{os.getpid()}"
        self.processes: list[subprocess.Popen[str]] = []

    def address(self, name: str) -> str:
        """A host's address."""
        return f"10.77.0.{self.names.index(name) + 1}"

    def build(self) -> None:
        """Make the switch, and each host with its cable to it."""
        # The switch has a namespace of its own: nothing of this shows on the machine's network.
        _ip("netns", "add", f"{self.tag}-switch")
        _ip("-n", f"{self.tag}-switch", "link", "add", "switch", "type", "bridge")
        _ip("-n", f"{self.tag}-switch", "link", "set", "switch", "up")
        for number, name in enumerate(self.names):
            space, port = self._space(name), f"port{number}"
            _ip("netns", "add", space)
            cable = ("link", "add", "eth0", "netns", space, "type", "veth")
            _ip(*cable, "peer", "name", port, "netns", f"{self.tag}-switch")
            _ip("-n", f"{self.tag}-switch", "link", "set", port, "master", "switch", "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
            others = [f"{self.address(other)} {other}" for other in self.names if other != name]
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]
            (self.folder / f"hosts.{name}").write_text("\n".join(lines) + "\n")

    def command(self, name: str, *words: str) -> list[str]:
        """The words that run a command on a host; all of it dies with the first process."""
        unshare = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter = ["sh", "-c", _ENTER, "sh", str(self.folder / f"hosts.{name}"), name]
        # Not `ip netns exec`, which hides the control groups that Slurm wants to see.
        network = ["nsenter", f"--net=/run/netns/{self._space(name)}"]
        return [*network, "unshare", *unshare, *enter, *words]

    def start(self, name: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command on a host; its output, both streams together, goes to a pipe."""
        process = subprocess.Popen(
            self.command(name, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment() | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | variables,
            cwd=ROOT,
        )
        self.processes.append(process)
        return process

    def cut(self, name: str) -> None:
        """Pull a host's cable."""
        self._link(name, "down")

    def mend(self, name: str) -> None:
        """Put it in again."""
        self._link(name, "up")

    def left_over(self, name: str) -> list[str]:
        """Processes that still run on a host."""
        found = []
        for pid in self._pids(name):
            with suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        return found

    def power_off(self, name: str) -> None:
        """What a power cut does to a host: nothing on it says goodbye, nobody gets in by `ssh`."""
        (self.folder / f"off.{name}").touch()
        while pids := self._pids(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def power_on(self, name: str) -> None:
        """Let `ssh` in again."""
        (self.folder / f"off.{name}").unlink()

    def ssh(self) -> Path:
        """A stand-in for ssh: `SSH HOST "WORDS"` runs them there; 255 says that it was lost."""
        path = self.folder / "ssh"
        cases = "".join(
            f'{name}) set -- {shlex.join(self.command(name, "sh", "-c"))} "$2" ;;\n'
            for name in self.names
        )
        lost = 'echo "ssh: Could not resolve hostname $1" >&2; exit 255'
        path.write_text(
            f'#!/bin/sh\n[ ! -e "{self.folder}/off.$1" ] || exit 255\n'
            f'case "$1" in\n{cases}*) {lost} ;;\nesac\n'
            '"$@" || { code=$?; [ $code -eq 137 ] && exit 255; exit $code; }\n'
        )
        path.chmod(0o755)
        return path

    def tear_down(self) -> None:
        """End what runs on the hosts and take all away."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()  # type: ignore[union-attr]
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                self.power_off(name)
        for name in [*self.names, "switch"]:
            space = f"{self.tag}-switch" if name == "switch" else self._space(name)
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)

    def _link(self, name: str, state: str) -> None:
        port = f"port{self.names.index(name)}"
        _ip("-n", f"{self.tag}-switch", "link", "set", port, state)

    def _pids(self, name: str) -> list[int]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self._space(name)], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def _space(self, name: str) -> str:
        return f"{self.tag}-{name}"


@contextmanager
def hosts(folder: Path, *names: str) -> Iterator[Hosts]:
    """Hosts for the length of a `with` block."""
    made = Hosts(folder, names)
    try:
        made.build()
        yield made
    finally:
        made.tear_down()


def wait_until(condition, seconds: float, what: str) -> None:
    """Poll until the condition holds.

    Raises:
        AssertionError: it did not in that time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
