"""Blocks read by another process are the blocks read here, and its memory is used again."""

from __future__ import annotations

import gzip
import hashlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import zstandard

from litespark.data.readers import Source
from litespark.data.reading import (
    SLOT_BYTES,
    Inputs,
    ReadingElsewhere,
    ReadingHere,
    SharedBlock,
    SharedBytes,
    can_read_elsewhere,
)
from litespark.errors import UserError

pytestmark = pytest.mark.skipif(not can_read_elsewhere(), reason="needs memfd and /proc")


@pytest.fixture(scope="module")
def pools():
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=spawn) as first,
        ProcessPoolExecutor(1, mp_context=spawn) as second,
    ):
        yield [first, second]


@pytest.fixture
def pool(pools):
    return pools[0]


@pytest.fixture
def sources(tmp_path):
    """Compressed and plain, nothing at all, a text, and a line that no slot holds."""
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(3000))
    contents = {
        "a.jsonl": lines,
        "b.jsonl": b"",
        "c.jsonl.gz": gzip.compress(lines[:5000]),
        "d.jsonl.zst": zstandard.compress(lines) + zstandard.compress(lines[:-1]),
        "e.jsonl": lines[:3000] + b'{"text": "' + b"x" * SLOT_BYTES + b'"}\n' + lines,
        "f.txt": b"all of it\n" * 1000,
        "g.jsonl": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [Source(str(tmp_path / name), name) for name in contents]


def everything(reading):
    """Return what is read, with the blocks' data; each block is released at once."""
    found = []
    for read in reading:
        block = read.block.load() if isinstance(read.block, SharedBlock) else read.block
        found.append(replace(read, block=block))
        if read.block is not None:
            reading.release(read.block)
    if isinstance(reading, ReadingElsewhere):
        reading.close()
    return found


@pytest.mark.parametrize(
    "place",
    [{}, {"done_sources": frozenset({0, 1}), "first_source": 3, "done_blocks": 5}],
    ids=["all", "the rest"],
)
def test_another_process_reads_the_same(pool, sources, place):
    inputs = Inputs(sources, block_bytes=2000, **place)
    here = everything(ReadingHere(inputs))
    assert everything(ReadingElsewhere([pool], inputs, 3)) == here
    assert len(here) > 20  # more than there are slots
    digests = {read.number: read.sha256 for read in here if read.block is None}
    done = inputs.done_sources
    assert digests == {
        number: hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
        for number, source in enumerate(sources)
        if number not in done
    }


@pytest.mark.parametrize("place", [{}, {"done_sources": frozenset({0, 1}), "first_source": 3}])
def test_two_processes_read_the_same_in_the_same_order(pools, sources, place):
    inputs = Inputs(sources, block_bytes=2000, **place)
    here = everything(ReadingHere(inputs))
    there = everything(ReadingElsewhere(pools, inputs, 3))
    assert [read.block for read in there] == [read.block for read in here]
    assert [read.number for read in there] == [read.number for read in here]
    assert [read.sha256 for read in there] == [read.sha256 for read in here]
    assert there[-1].read_bytes == here[-1].read_bytes


def test_ids_lie_beside_the_text(pool, sources):
    reading = ReadingElsewhere([pool], Inputs(sources[:1], block_bytes=2000), 100)
    blocks = [read.block for read in reading if read.block is not None]
    texts = [block.load() for block in blocks]
    room = SLOT_BYTES - blocks[0].data.size_bytes
    parts = [b"a" * 13, b"b" * (room - 100), b"c" * 200, b"d" * 8]
    stored = [block.put_beside(parts) for block in blocks]
    for one in stored:
        assert [bytes(p.view()) if isinstance(p, SharedBytes) else p for p in one] == parts
        assert [isinstance(part, SharedBytes) for part in one] == [True, True, False, True]
        assert all(p.offset_bytes % 8 == 0 for p in one if isinstance(p, SharedBytes))
    assert [block.load() for block in blocks] == texts
    reading.close()


def test_blocks_lie_in_shared_memory_unless_they_are_too_large(pool, sources):
    reading = ReadingElsewhere([pool], Inputs(sources[4:5], block_bytes=2000), 100)
    kinds = [type(read.block) for read in reading]
    reading.close()
    assert kinds.count(SharedBlock) > 10
    assert [kind.__name__ for kind in kinds].count("LineBlock") == 1


def test_a_block_keeps_its_data_until_it_is_released(pool, sources):
    inputs = Inputs(sources[:1], block_bytes=2000)
    expected = [read.block for read in ReadingHere(inputs)][:5]
    reading = ReadingElsewhere([pool], inputs, 5)
    reads = iter(reading)
    blocks = [next(reads).block for _ in range(5)]  # more are read ahead meanwhile
    assert [block.load() for block in blocks] == expected
    reading.close()


def test_what_is_wrong_with_a_file_is_told_where_it_is_met(pool, sources, tmp_path):
    path = tmp_path / "broken.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "x"}\n' * 100000)[:-20])
    reading = ReadingElsewhere([pool], Inputs([sources[0], Source(str(path), "b")]), 3)
    assert next(iter(reading)).number == 0
    with pytest.raises(UserError, match="cannot be read to its end") as caught:
        everything(reading)
    assert caught.value.where == str(path)
    reading.close()


def test_a_reader_ahead_does_not_tell_before_its_turn(pools, sources, tmp_path):
    """The first reader meets the third file while the second one's blocks are still to come."""
    path = tmp_path / "broken.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "x"}\n')[:-3])
    inputs = Inputs([*sources[2:4], Source(str(path), "b")], block_bytes=2000)
    ended: list[int] = []

    def read_on(reading):
        ended.extend(read.number for read in reading if read.block is None)

    reading = ReadingElsewhere(pools, inputs, 1000)
    with pytest.raises(UserError, match="cannot be read to its end"):
        read_on(reading)
    reading.close()
    assert ended == [0, 1]


def test_a_dead_reader_is_noticed(sources):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        reading = ReadingElsewhere([pool], Inputs(sources[:1], block_bytes=2000), 3)
        next(iter(reading))
        for process in pool._processes.values():
            process.kill()
        with pytest.raises(BrokenProcessPool):
            everything(reading)
        reading.close()
