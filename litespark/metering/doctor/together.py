"""The nodes together: who is there, who reaches whom, whose clock is off, who is slow.

In this order, each with a timeout, because each needs what the one before has shown:

    roll call      every rank writes its name into the key-value store; who does not is missing
    connections    one rank of each node connects to every other node over plain TCP
    sameness       code and packages (`training.same_everywhere` does the same at a run's start)
    clocks         against rank 0, by the shortest of several exchanges, as NTP does
    all-reduce     one sum over all ranks, checked, over NCCL where there are GPUs
    bandwidth      every rank with every other, all pairs of a round at once

The store answers while a node does not, so that what is missing can be named.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from litespark.metering.doctor.finding import Finding, fine, warning, wrong
from litespark.parallel.device import ComputeDevice, select_device
from litespark.parallel.environment import integer_from_environment
from litespark.parallel.groups import choose_interface
from litespark.utils.facts import differences
from litespark.utils.network import (
    address_towards,
    connection_problem,
    is_loopback,
    outward_address,
    resolve,
)

_CPU_BYTES, _GPU_BYTES = 8 << 20, 128 << 20  # of one message of the bandwidth table
_ROUNDS_AT_MOST = 64  # of it; with more ranks, distances 1, 2, 4, ... stand for all
_SLOW_SHARE = 0.5  # of the median between nodes
_SKEW_SECONDS = 1.0
_EXCHANGES = 7


@dataclass(frozen=True)
class Rank:
    """One rank in the roll call."""

    number: int
    host: str
    address: str
    port: int

    @property
    def name(self) -> str:
        """`rank 3 on node-b`."""
        return f"rank {self.number} on {self.host}"


class Together:
    """This rank among the others; every rank makes the same calls in the same order.

    Args:
        timeout_seconds: how long each of the steps above may take.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout = timeout_seconds
        self.rank = integer_from_environment("RANK")
        self.world_size = integer_from_environment("WORLD_SIZE")
        self.local_world_size = integer_from_environment("LOCAL_WORLD_SIZE")
        wait = timedelta(seconds=timeout_seconds)
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            None,
            self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            wait,
            wait_for_workers=False,
        )
        self.ranks: list[Rank] = []
        self.device: ComputeDevice | None = None

    # -------------------------------------------------------------- without a process group

    def roll_call(self) -> list[Finding]:
        """Learn who is there."""
        listener = socket.create_server(("", 0))
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        address = address_towards(resolve(os.environ["MASTER_ADDR"]))
        if is_loopback(address):
            address = outward_address() or address
        own = Rank(self.rank, socket.gethostname(), address, listener.getsockname()[1])
        self.store.set(f"doctor/rank/{self.rank}", json.dumps(asdict(own)))
        deadline = time.monotonic() + self.timeout
        keys = {number: f"doctor/rank/{number}" for number in range(self.world_size)}
        missing = list(keys)
        while missing and time.monotonic() < deadline:
            missing = [number for number in missing if not self.store.check([keys[number]])]
            time.sleep(0.05 if missing else 0)
        self.ranks = [
            Rank(**json.loads(self.store.get(key)))
            for number, key in keys.items()
            if number not in missing
        ]
        hosts = list(dict.fromkeys(rank.host for rank in self.ranks))
        if missing:
            seen = f"ranks {', '.join(map(str, missing))} did not come; here are {', '.join(hosts)}"
            return [wrong("roll call", seen, "look at the output on the nodes that are not named")]
        return [fine("roll call", f"{self.world_size} ranks on {len(hosts)} nodes")]

    def connections(self) -> list[Finding]:
        """Whether each node reaches each other node, over TCP, rank 0 included."""
        firsts = {rank.host: rank for rank in reversed(self.ranks)}
        own = self.ranks[self.rank]
        if firsts[own.host] == own:
            failed = {
                other.host: problem
                for other in firsts.values()
                if other.host != own.host
                and (problem := connection_problem(other.address, other.port))
            }
            self.store.set(f"doctor/reach/{own.host}", json.dumps(failed))
        found = []
        for host in firsts:
            for other, problem in json.loads(self._get(f"doctor/reach/{host}")).items():
                fix = f"on {host}: ping {firsts[other].address}; a firewall? the wrong interface?"
                found.append(wrong("connections", f"{host} cannot reach {other}: {problem}", fix))
        count = len(firsts)
        return found or [fine("connections", f"each of {count} nodes reaches each other")]

    def sameness(self, facts: dict[str, str]) -> list[Finding]:
        """Whether all ranks have the same facts: hashes of code, versions."""
        self.store.set(f"doctor/facts/{self.rank}", json.dumps(facts))
        all_facts = [
            json.loads(self._get(f"doctor/facts/{number}")) for number in range(self.world_size)
        ]
        hosts = [rank.host for rank in self.ranks]
        found = [
            wrong("sameness", line, "install the same on every node")
            for line in differences(list(zip(hosts, all_facts, strict=True)))
        ]
        return found or [fine("sameness", "the same code and packages on all ranks")]

    # ----------------------------------------------------------------- with a process group

    def join(self) -> None:
        """Start torch.distributed."""
        local_rank = integer_from_environment("LOCAL_RANK")
        self.device = select_device(local_rank, self.local_world_size)
        if self.local_world_size < self.world_size:
            choose_interface()
        dist.init_process_group(
            self.device.distributed_backend,
            store=PrefixStore("doctor/group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout),
        )

    def clocks(self) -> list[Finding]:
        """Each node's clock against rank 0's."""
        skews = torch.zeros(self.world_size, dtype=torch.float64)
        stamp = torch.zeros(1, dtype=torch.float64)
        for other in range(1, self.world_size):
            best = float("inf")
            for _ in range(_EXCHANGES):
                if self.rank == 0:
                    sent = time.time()
                    dist.send(stamp, other)
                    dist.recv(stamp, other)
                    passed = time.time() - sent
                    if passed < best:
                        best, skews[other] = passed, stamp.item() - (sent + passed / 2)
                elif self.rank == other:
                    dist.recv(stamp, 0)
                    stamp[0] = time.time()
                    dist.send(stamp, 0)
        dist.broadcast(skews, 0)
        worst = int(skews.abs().argmax())
        seen = f"at most {abs(skews[worst].item()) * 1e3:.1f} ms apart ({self.ranks[worst].host})"
        if abs(skews[worst].item()) > _SKEW_SECONDS:
            return [warning("time skew", seen, "start chrony on all nodes")]
        return [fine("time skew", seen)]

    def all_reduce(self) -> list[Finding]:
        """A sum over all ranks: its value, and its speed as NCCL's tests count it."""
        count = self._message_bytes() // 4
        values = torch.full((count,), float(self.rank + 1), device=self._torch_device())
        dist.all_reduce(torch.ones(1, device=self._torch_device()))  # connections are made here
        self._barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        self._barrier()
        seconds = time.perf_counter() - started
        expected = self.world_size * (self.world_size + 1) / 2
        is_right = torch.zeros(self.world_size)
        is_right[self.rank] = float(bool((values == expected).all()))
        dist.all_reduce(is_right)
        if not bool(is_right.all()):
            names = [rank.name for rank in self.ranks if not is_right[rank.number]]
            seen = f"another sum than {expected:g} came to {', '.join(names)}"
            return [wrong("all-reduce", seen, "take these nodes out and test their memory")]
        bus = 2 * (self.world_size - 1) / self.world_size * count * 4 / seconds / 1e9
        backend = "NCCL" if self._is_cuda() else "gloo"
        return [fine("all-reduce", f"{count * 4 >> 20} MiB over {backend}: {bus:.2f} GB/s (bus)")]

    def bandwidth(self) -> tuple[list[Finding], list[list[float]]]:
        """GB/s between every two ranks, and the nodes that are slow; NaN was not measured."""
        message = torch.ones(self._message_bytes() // 4, device=self._torch_device())
        answer = torch.empty_like(message)
        row = torch.full((self.world_size,), float("nan"), dtype=torch.float64)
        for distance in _distances(self.world_size):
            partner = _partner(self.rank, distance, self.world_size)
            self._barrier()
            if partner == self.rank:
                continue
            for is_measured in (False, True):  # the first makes the connection
                started = time.perf_counter()
                operations = [
                    dist.P2POp(dist.isend, message, partner),
                    dist.P2POp(dist.irecv, answer, partner),
                ]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
                if self._is_cuda():
                    torch.cuda.synchronize()
                if is_measured:
                    seconds = time.perf_counter() - started
                    row[partner] = message.numel() * 4 / seconds / 1e9
        rows = [torch.zeros_like(row) for _ in range(self.world_size)]
        dist.all_gather(rows, row)
        table = [line.tolist() for line in rows]
        return judge_bandwidth(table, [rank.host for rank in self.ranks]), table

    def _get(self, key: str) -> bytes:
        self.store.wait([key], timedelta(seconds=self.timeout))
        return self.store.get(key)

    def _barrier(self) -> None:
        if self._is_cuda():
            torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))

    def _is_cuda(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def _torch_device(self) -> torch.device:
        return torch.device("cpu") if self.device is None else self.device.device

    def _message_bytes(self) -> int:
        return _GPU_BYTES if self._is_cuda() else _CPU_BYTES


def judge_bandwidth(table: Sequence[Sequence[float]], hosts: Sequence[str]) -> list[Finding]:
    """Which nodes are slow: by the median of their links to other nodes, against all nodes'.

    A link counts by the slower of its two ends, so that one slow node makes its links slow and
    leaves those of the others alone.
    """
    by_host: dict[str, list[float]] = {host: [] for host in hosts}
    within: list[float] = []
    for a, row in enumerate(table):
        for b, speed in enumerate(row):
            if speed != speed or a == b:  # NaN: not measured
                continue
            if hosts[a] == hosts[b]:
                within.append(speed)
            else:
                by_host[hosts[a]].append(min(speed, table[b][a]))
    medians = {host: statistics.median(speeds) for host, speeds in by_host.items() if speeds}
    found = []
    if within:
        seen = f"median {statistics.median(within):.2f} GB/s, slowest {min(within):.2f}"
        found.append(fine("bandwidth within nodes", seen))
    if not medians:
        return found
    typical = statistics.median(medians.values())
    slow = {host: speed for host, speed in medians.items() if speed < _SLOW_SHARE * typical}
    for host, speed in slow.items():
        seen = f"{host} has {speed:.3f} GB/s to the others, of a median of {typical:.3f}"
        fix = f"leave {host} out, and look at its link: ip -s link, ethtool, ibstat, nvidia-smi"
        found.append(wrong("bandwidth between nodes", seen, fix))
    if not slow:
        slowest = min(medians, key=lambda host: medians[host])
        seen = f"median {typical:.2f} GB/s, slowest node {slowest} {medians[slowest]:.2f}"
        found.append(fine("bandwidth between nodes", seen))
    return found


def _distances(world_size: int) -> list[int]:
    """Which rounds to play; see `_partner`."""
    if world_size - 1 <= _ROUNDS_AT_MOST:
        return list(range(world_size))
    return [1 << bit for bit in range(world_size.bit_length())]


def _partner(rank: int, number: int, world_size: int) -> int:
    """Who plays whom in round `number` of a tournament in which all pairs meet; oneself: nobody.

    In round k those whose numbers add up to k (mod n) meet.
    """
    return (number - rank) % world_size


def format_table(table: Sequence[Sequence[float]], hosts: Sequence[str]) -> Iterator[str]:
    """The bandwidth table in lines, GB/s, the row's rank to the column's."""
    width = max(len(host) for host in hosts)
    yield " " * (width + 6) + "".join(f"{number:>8d}" for number in range(len(table)))
    for number, row in enumerate(table):
        cells = "".join(f"{speed:8.2f}" if speed == speed else f"{'-':>8s}" for speed in row)
        yield f"{hosts[number]:>{width}s} {number:4d} {cells}"


def _accept(listener: socket.socket) -> None:
    while True:
        connection: Any = listener.accept()[0]
        connection.close()
