"""The blocks of all input files, in order, read by this process or by some of their own.

Decompressing, cutting and handing blocks on takes the parent of a job some 4 ms a megabyte, which
is as much as ten workers keep up with.  For more of them other processes read, each a part of the
files, into memory that the workers and the parent see too; and the workers leave the token ids
beside the text.  What goes through pipes is where things are:

    readers  -- text -->  slots of a memfd  <-- ids --  N workers
    parent   <-- places of blocks, places of ids        (appends the ids to the shards)

The memory is a memfd, reached through `/proc`: it goes with the last process that has it, whatever
kills them, and is not what a container's small `/dev/shm` limits.  What does not fit into a slot
travels as bytes.  The blocks are the same both ways, so a job may go on the other way.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from litespark.data.readers import BLOCK_BYTES, LineBlock, Meter, Source, iterate_pieces

# For a block, whose last line can be long, and its ids.  Only what was ever used takes memory.
SLOT_BYTES = 4 * BLOCK_BYTES
_READ_AHEAD_BLOCKS = 8  # of each reader
_ALIGNMENT = 8  # of ids


@dataclass(frozen=True)
class Inputs:
    """What is to be read, and where to begin.

    Attributes:
        sources: the files, in order.
        columns: see `litespark.data.readers.iterate_blocks`.
        done_sources: numbers of files that are passed over.
        first_source, done_blocks: of this file so many blocks are passed over.
        block_bytes: see `litespark.data.readers.iterate_blocks`.
    """

    sources: Sequence[Source]
    columns: tuple[str, ...] = ()
    done_sources: frozenset[int] = frozenset()
    first_source: int = 0
    done_blocks: int = 0
    block_bytes: int = BLOCK_BYTES


class _MemoryName(NamedTuple):
    """Where processes find a `_Memory`; a later one of the same path has another number."""

    path: str
    number: int


@dataclass(frozen=True)
class SharedBytes:
    """Bytes in memory shared with other processes."""

    memory: _MemoryName
    offset_bytes: int
    size_bytes: int

    def view(self) -> memoryview:
        """Return the bytes as they are now; nobody may write to them."""
        end = self.offset_bytes + self.size_bytes
        return memoryview(_mapped(self.memory)).toreadonly()[self.offset_bytes : end]


@dataclass(frozen=True)
class SharedBlock:
    """A `LineBlock` whose data lies in memory shared with other processes, at a slot's begin."""

    source: Source
    first_line: int
    data: SharedBytes

    def load(self) -> LineBlock:
        """Return the block with a copy of its data."""
        return LineBlock(self.source, self.first_line, bytes(self.data.view()))

    def put_beside(self, parts: Sequence[bytes]) -> list[bytes | SharedBytes]:
        """Return the parts, stored in what the block leaves of its slot as far as they fit."""
        memory, slot = self.data.memory, self.data.offset_bytes
        place, stored = slot + self.data.size_bytes, list[bytes | SharedBytes]()
        for part in parts:
            place += -place % _ALIGNMENT
            end = place + len(part)
            if end > slot + SLOT_BYTES:
                stored.append(part)
                continue
            _mapped(memory)[place:end] = part
            stored.append(SharedBytes(memory, place, len(part)))
            place = end
        return stored


Block = LineBlock | SharedBlock


@dataclass(frozen=True)
class Read:
    """The next block, or the end of a file.

    Attributes:
        number: of the file.
        read_bytes: of the files themselves, so far.
        block: None at the file's end.
        sha256: of the file, at its end.
    """

    number: int
    read_bytes: int
    block: Block | None = None
    sha256: str = ""


class Reading(Protocol):
    """All blocks in order, and the end of each file."""

    def __iter__(self) -> Iterator[Read]: ...

    def release(self, block: Block) -> None:
        """Say that nobody needs the block's data any more, nor ids beside it."""
        ...


def _reads(inputs: Inputs, keep: Callable[[Source, int, Sequence[bytes]], Block]) -> Iterator[Read]:
    """Read everything; `keep` makes a block of a file, its first line's number and its pieces."""
    meter = Meter()
    for number, source in enumerate(inputs.sources):
        if number in inputs.done_sources:
            continue
        done = inputs.done_blocks if number == inputs.first_source else 0
        for first_line, pieces in iterate_pieces(source, inputs.block_bytes, meter, inputs.columns):
            if done > 0:
                done -= 1
                continue
            yield Read(number, meter.read_bytes, keep(source, first_line, pieces))
        yield Read(number, meter.read_bytes, sha256=meter.sha256())


def _joined(source: Source, first_line: int, pieces: Sequence[bytes]) -> LineBlock:
    return LineBlock(source, first_line, b"".join(pieces))


class ReadingHere:
    """Reads in this process; see `Reading`.

    Raises:
        UserError: see `litespark.data.readers.iterate_blocks`; while it is iterated.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __iter__(self) -> Iterator[Read]:
        return _reads(self._inputs, _joined)

    def release(self, block: Block) -> None:
        """Nothing is kept here."""


class ReadingElsewhere:
    """Lets other processes read, ahead of what is asked for; see `Reading`.

    Each reads every so many-th file, so that they are all at work where there are many files.

    Args:
        pools: of one process each.
        inputs: what they read.
        most_blocks: how many may be out before one is released.

    Raises:
        UserError: see `litespark.data.readers.iterate_blocks`; while it is iterated.
        BrokenProcessPool: when a process died; while it is iterated.
    """

    def __init__(self, pools: Sequence[Executor], inputs: Inputs, most_blocks: int) -> None:
        self._inputs = inputs
        numbers = range(len(inputs.sources))
        self._lanes: list[_Lane] = []
        for lane, pool in enumerate(pools):
            others = (number for number in numbers if number % len(pools) != lane)
            its_own = replace(inputs, done_sources=inputs.done_sources.union(others))
            self._lanes.append(_Lane(pool, its_own, most_blocks + _READ_AHEAD_BLOCKS))
        self._lane_of = {lane.memory.name: lane for lane in self._lanes}

    def __iter__(self) -> Iterator[Read]:
        for number in range(len(self._inputs.sources)):
            if number in self._inputs.done_sources:
                continue
            lane, read = self._lanes[number % len(self._lanes)], None
            while read is None or read.block is not None:
                read = lane.take()
                read_bytes = sum(lane.read_bytes for lane in self._lanes)
                yield replace(read, read_bytes=read_bytes)

    def release(self, block: Block) -> None:
        """Let the block's slot be used again."""
        if isinstance(block, SharedBlock):
            self._lane_of[block.data.memory].release(block.data.offset_bytes)

    def close(self) -> None:
        """Let the memory go; it stays for processes that have it."""
        for lane in self._lanes:
            lane.memory.close()
        _mapped.cache_clear()


class _Lane:
    """One reading process and the slots that it fills.

    Attributes:
        read_bytes: of its files, up to the block taken last.
    """

    def __init__(self, pool: Executor, inputs: Inputs, num_slots: int) -> None:
        self._pool = pool
        self.memory = _Memory(num_slots * SLOT_BYTES)
        self.read_bytes = 0
        self._free = [slot * SLOT_BYTES for slot in reversed(range(num_slots))]
        self._asked: deque[tuple[int, Future[Read | None]]] = deque()
        self._begun = pool.submit(_begin, inputs, self.memory.name)
        self._ask()

    def _ask(self) -> None:
        while self._free and len(self._asked) < _READ_AHEAD_BLOCKS:
            slot = self._free.pop()  # the one used last: the fewer are used, the less memory
            self._asked.append((slot, self._pool.submit(_read_next, slot)))

    def take(self) -> Read:
        """Return what is read next, which must not be beyond the last file's end."""
        self._begun.result()
        slot, future = self._asked.popleft()
        read = future.result()
        assert read is not None, "nobody asks after the last file's end"
        if not isinstance(read.block, SharedBlock):  # an end, or too large for the slot
            self._free.append(slot)
        self._ask()
        self.read_bytes = read.read_bytes
        return read

    def release(self, slot: int) -> None:
        """Let a slot be used again."""
        self._free.append(slot)
        self._ask()


class _Memory:
    """Zeros that other processes reach by `name` while this process has it open."""

    _numbers = itertools.count()

    def __init__(self, size_bytes: int) -> None:
        self._fd = os.memfd_create("litespark-blocks")
        os.ftruncate(self._fd, size_bytes)
        self.name = _MemoryName(f"/proc/{os.getpid()}/fd/{self._fd}", next(self._numbers))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def can_read_elsewhere() -> bool:
    """Whether this system has memory of the kind that `ReadingElsewhere` needs (Linux has)."""
    if not hasattr(os, "memfd_create"):
        return False
    memory = _Memory(mmap.PAGESIZE)
    try:
        return os.path.exists(memory.name.path)
    finally:
        memory.close()


@functools.lru_cache
def _mapped(name: _MemoryName) -> mmap.mmap:
    with open(name.path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def warm_up() -> None:
    """Import what reading needs; the first task of a process makes it start."""
    import zstandard  # noqa: F401


class _Reader:
    """What the reading process keeps between calls."""

    def __init__(self, inputs: Inputs, memory: _MemoryName) -> None:
        self._reads = _reads(inputs, self._put)
        self._memory = memory
        self._slot = 0

    def read_next(self, slot: int) -> Read | None:
        """Put the next block into a slot; None when all is read, for it is asked ahead."""
        self._slot = slot
        return next(self._reads, None)

    def _put(self, source: Source, first_line: int, pieces: Sequence[bytes]) -> Block:
        size_bytes = sum(map(len, pieces))
        if size_bytes > SLOT_BYTES:
            return _joined(source, first_line, pieces)
        memory, place = _mapped(self._memory), self._slot
        for piece in pieces:
            memory[place : place + len(piece)] = piece
            place += len(piece)
        return SharedBlock(source, first_line, SharedBytes(self._memory, self._slot, size_bytes))


_reader: _Reader | None = None


def _begin(inputs: Inputs, memory: _MemoryName) -> None:
    global _reader
    _reader = _Reader(inputs, memory)


def _read_next(slot: int) -> Read | None:
    assert _reader is not None
    return _reader.read_next(slot)
