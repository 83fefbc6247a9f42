"""The blocks of all input files, in order, read by this process or by one of its own.

Decompressing, cutting and handing blocks on takes the parent of a job some 4 ms a megabyte, which
is as much as ten workers keep up with.  For more of them a process of its own reads, into memory
that the workers see too, and the parent handles only the places of blocks there:

    reader  -> slots of a memfd ->  N workers        (text)
    parent  <- places of blocks, results             (a few bytes; token ids)

The memory is a memfd, reached through `/proc`: it goes with the last process that has it, whatever
kills them, and is not what a container's small `/dev/shm` limits.  A block that does not fit into a
slot travels as bytes.  The blocks are the same both ways, so a job may go on the other way.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from litespark.data.readers import BLOCK_BYTES, LineBlock, Meter, Source, iterate_pieces

# Lines are long at times; of a slot only what was ever used takes memory.
SLOT_BYTES = 4 * BLOCK_BYTES
_READ_AHEAD_BLOCKS = 4


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
class SharedBlock:
    """A `LineBlock` whose data lies in memory shared with other processes."""

    source: Source
    first_line: int
    memory: _MemoryName
    offset_bytes: int
    size_bytes: int

    def load(self) -> LineBlock:
        """Return the block with a copy of its data."""
        end = self.offset_bytes + self.size_bytes
        data = _mapped(self.memory, mmap.ACCESS_READ)[self.offset_bytes : end]
        return LineBlock(self.source, self.first_line, data)


Block = LineBlock | SharedBlock


@dataclass(frozen=True)
class Read:
    """The next block, and what is known when it has been read.

    Attributes:
        number: of the block's file; of all files when the end is reached.
        block: None at the end.
        read_bytes: of the files themselves, so far.
        ended: (number, SHA-256) of the files that were found to end before this block.
    """

    number: int
    block: Block | None
    read_bytes: int
    ended: tuple[tuple[int, str], ...]


class Reading(Protocol):
    """All blocks in order, and then one `Read` without a block."""

    def __iter__(self) -> Iterator[Read]: ...

    def release(self, block: Block) -> None:
        """Say that nobody needs the block's data any more."""
        ...

    def close(self) -> None:
        """End the reading; to be called at its end, at the latest by the end of the process."""
        ...


@dataclass(frozen=True)
class _Cut:
    """A `Read` whose block is still in pieces."""

    number: int
    first_line: int
    pieces: list[bytes]
    read_bytes: int
    ended: tuple[tuple[int, str], ...]


def _cuts(inputs: Inputs) -> Iterator[_Cut]:
    meter = Meter()
    ended: tuple[tuple[int, str], ...] = ()
    for number, source in enumerate(inputs.sources):
        if number in inputs.done_sources:
            continue
        done = inputs.done_blocks if number == inputs.first_source else 0
        for first_line, pieces in iterate_pieces(source, inputs.block_bytes, meter, inputs.columns):
            if done > 0:
                done -= 1
                continue
            yield _Cut(number, first_line, pieces, meter.read_bytes, ended)
            ended = ()
        ended = (*ended, (number, meter.sha256()))
    yield _Cut(len(inputs.sources), 0, [], meter.read_bytes, ended)


class ReadingHere:
    """Reads in this process; see `Reading`.

    Raises:
        UserError: see `litespark.data.readers.iterate_blocks`; while it is iterated.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __iter__(self) -> Iterator[Read]:
        sources = self._inputs.sources
        for cut in _cuts(self._inputs):
            block = None
            if cut.number < len(sources):
                block = LineBlock(sources[cut.number], cut.first_line, b"".join(cut.pieces))
            yield Read(cut.number, block, cut.read_bytes, cut.ended)

    def release(self, block: Block) -> None:
        """Nothing is kept here."""

    def close(self) -> None:
        """Nothing is held here."""


class ReadingElsewhere:
    """Lets another process read, ahead of what is asked for; see `Reading`.

    Args:
        pool: of one process.
        inputs: what it reads.
        most_blocks: how many may be out before one is released.

    Raises:
        UserError: see `litespark.data.readers.iterate_blocks`; while it is iterated.
        BrokenProcessPool: when the process died; while it is iterated.
    """

    def __init__(self, pool: Executor, inputs: Inputs, most_blocks: int) -> None:
        self._pool = pool
        num_slots = most_blocks + _READ_AHEAD_BLOCKS
        self._memory = _Memory(num_slots * SLOT_BYTES)
        self._free = deque(slot * SLOT_BYTES for slot in range(num_slots))
        self._asked: deque[tuple[int, Future[Read]]] = deque()
        self._has_ended = False
        self._begun = pool.submit(_begin, inputs, self._memory.name)
        self._ask()

    def _ask(self) -> None:
        while self._free and not self._has_ended:
            slot = self._free.popleft()
            self._asked.append((slot, self._pool.submit(_read_next, slot)))

    def __iter__(self) -> Iterator[Read]:
        self._begun.result()
        while True:
            slot, future = self._asked.popleft()
            read = future.result()
            if isinstance(read.block, LineBlock):  # too large for the slot, which is free again
                self._free.append(slot)
                self._ask()
            self._has_ended = read.block is None
            yield read
            if self._has_ended:
                return

    def release(self, block: Block) -> None:
        """Let the block's slot be used again."""
        if isinstance(block, SharedBlock):
            self._free.append(block.offset_bytes)
            self._ask()

    def close(self) -> None:
        """Let the memory go; it stays for processes that have it."""
        self._memory.close()


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


@functools.lru_cache(maxsize=1)
def _mapped(name: _MemoryName, access: int) -> mmap.mmap:
    with open(name.path, "rb" if access == mmap.ACCESS_READ else "r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def warm_up() -> None:
    """Import what reading needs; the first task of a process makes it start."""
    import zstandard  # noqa: F401


class _Reader:
    """What the reading process keeps between calls."""

    def __init__(self, inputs: Inputs, memory: _MemoryName) -> None:
        self._sources = inputs.sources
        self._cuts = _cuts(inputs)
        self._memory = memory

    def read_next(self, slot: int) -> Read:
        cut = next(self._cuts, None)
        if cut is None or cut.number == len(self._sources):  # it is asked on after the end
            at_end = (cut.read_bytes, cut.ended) if cut else (0, ())
            return Read(len(self._sources), None, *at_end)
        source, size_bytes = self._sources[cut.number], sum(map(len, cut.pieces))
        block: Block
        if size_bytes > SLOT_BYTES:
            block = LineBlock(source, cut.first_line, b"".join(cut.pieces))
        else:
            memory, place = _mapped(self._memory, mmap.ACCESS_WRITE), slot
            for piece in cut.pieces:
                memory[place : place + len(piece)] = piece
                place += len(piece)
            block = SharedBlock(source, cut.first_line, self._memory, slot, size_bytes)
        return Read(cut.number, block, cut.read_bytes, cut.ended)


_reader: _Reader | None = None


def _begin(inputs: Inputs, memory: _MemoryName) -> None:
    global _reader
    _reader = _Reader(inputs, memory)


def _read_next(slot: int) -> Read:
    assert _reader is not None
    return _reader.read_next(slot)
