"""What a node of a run on several machines is told about the others, as pure parsing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from litespark.errors import UserError
from litespark.utils.network import is_loopback

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class NodeOptions:
    """How many nodes run together, and where they meet.

    `node_rank` is None where nodes are numbered in the order of their names; `address` is None
    where this node's is that of the route to `host`.  A node is given up when nothing has been
    heard of it for `lost_seconds`.  torch's 15 are too few: an agent that gets no processor time
    for so long (seen, at a load of 60 on 2 cores) is no lost node, and taken for one, it goes on
    beside those who start without it, until the run folder's lock stops them.
    """

    minimum: int
    maximum: int
    host: str
    port: int
    run_id: str = "litespark"
    node_rank: int | None = None
    address: str | None = None
    join_seconds: float = 600.0
    lost_seconds: float = 60.0

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on with fewer nodes than it could have."""
        return self.minimum < self.maximum

    @property
    def range_text(self) -> str:
        """`2`, or `1:4`, as it is typed."""
        return f"{self.minimum}:{self.maximum}" if self.is_elastic else str(self.maximum)


@dataclass(frozen=True)
class Member:
    """One node of a start, as it has introduced itself.

    `meeting` is the address that the meeting place's name has on this node.
    """

    name: str
    address: str
    meeting: str
    num_processes: int
    node_rank: int | None

    def sort_key(self) -> tuple[object, ...]:
        """Number by `--node-rank`, else by name, in which node2 comes before node10."""
        parts = re.split(r"(\d+)", self.name)
        natural = tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
        return (-1 if self.node_rank is None else self.node_rank, natural, self.address)


def parse_node_range(text: str) -> tuple[int, int]:
    """MIN and MAX of `N` or `MIN:MAX`.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    minimum, maximum = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= minimum <= maximum:
        raise UserError(
            f"--nnodes {text}",
            "is no number of nodes",
            "Give N, or MIN:MAX to go on with fewer, e.g. --nnodes 2 or --nnodes 1:2.",
        )
    return minimum, maximum


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of `HOST`, `HOST:PORT` or `[IPV6]:PORT`.

    Raises:
        UserError: it is none of them.
    """
    match = re.fullmatch(r"\[([0-9a-fA-F:.%\w]+)\](?::(\d+))?|([^:\s\[\]]+)(?::(\d+))?", text)
    port = int(match[2] or match[4] or DEFAULT_PORT) if match else 0
    if match is None or not 1 <= port <= 65535:
        raise UserError(
            f"--rdzv-endpoint {text}",
            "is no HOST:PORT",
            "Give one node's name or address, the same on all, e.g. node0:29500.",
        )
    return match[1] or match[3], port


def reachable_members(members: Sequence[Member]) -> list[Member]:
    """The members, of whom the one at the meeting place has the address that the others know.

    Its own name may be a loopback address on itself (Debian's 127.0.1.1), and nowhere else.
    """
    known = [member.meeting for member in members if not is_loopback(member.meeting)]
    return [
        replace(member, address=known[0]) if known and is_loopback(member.address) else member
        for member in members
    ]


def check_members(members: Sequence[Member]) -> None:
    """Whether the nodes of a start were started alike.

    Raises:
        UserError: on every node alike; it names the nodes that differ.
    """
    for option, values in (
        ("--nproc", [str(member.num_processes) for member in members]),
        (
            "--node-rank",
            ["given" if member.node_rank is not None else "none" for member in members],
        ),
    ):
        if len(set(values)) > 1:
            pairs = zip(values, members, strict=True)
            told = ", ".join(f"{value} on {member.name}" for value, member in pairs)
            raise UserError(option, f"differs: {told}", "Type the same on every node.")
    by_rank: dict[int, Member] = {}
    for member in members:
        if member.node_rank is None:
            continue
        if member.node_rank in by_rank:
            raise UserError(
                f"--node-rank {member.node_rank}",
                f"was given to {by_rank[member.node_rank].name} and to {member.name}",
                "Number the nodes from 0, each once.",
            )
        by_rank[member.node_rank] = member
