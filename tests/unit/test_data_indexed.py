"""The shard reader refuses what is not a whole shard, and the writer leaves none behind."""

from __future__ import annotations

import copy
import struct

import numpy as np
import pytest

from litespark.data.indexed import IndexedReader, IndexedWriter
from litespark.errors import UserError
from tests.support.data import write_shard

LENGTHS = [3, 0, 5, 2, 4]


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a", LENGTHS)
    return tmp_path / "a"


def edit(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


def put(data, offset, value, code):
    struct.pack_into(code, data, offset, value)
    return data


def test_reads_what_was_written(shard):
    reader = IndexedReader(shard)
    assert reader.documents == 5
    assert reader.tokens == 14
    assert reader.document_lengths_tokens.tolist() == LENGTHS
    assert reader.read(2).tolist() == [3, 4, 5, 6, 7]
    assert reader.read(2, 1, 3).tolist() == [4, 5, 6]
    assert reader.read(1).tolist() == []


@pytest.mark.parametrize(
    ("document", "start", "length"), [(5, 0, 1), (-1, 0, 1), (0, 0, 4), (0, 2, 2)]
)
def test_read_outside_the_document_is_an_error(shard, document, start, length):
    with pytest.raises(IndexError):
        IndexedReader(shard).read(document, start, length)


def test_is_copied_to_other_processes_as_its_prefix(shard):
    reader = IndexedReader(shard)
    assert reader.__getstate__() == {"prefix": str(shard)}
    assert copy.copy(reader).read(4).tolist() == [10, 11, 12, 13]  # by the pickle protocol


# S = 4 sequences: lengths at 34, offsets at 50, document indices (6) at 82, end at 130.
IDX_FAULTS = {
    "truncated": (lambda d: d[:-1], "cut short"),
    "cut in the header": (lambda d: d[:20], "ends inside its header"),
    "empty": (lambda d: d[:0], "not a Megatron index"),
    "garbage appended": (lambda d: d + b"x" * 999, "follows its end"),
    "foreign": (lambda d: b"PK\x03\x04" + d[4:], "not a Megatron index"),
    "version": (lambda d: put(d, 9, 2, "<Q"), "version 2"),
    "type code": (lambda d: put(d, 17, 7, "<B"), "type code 7"),
    "huge count": (lambda d: put(d, 18, 1 << 60, "<Q"), "cut short"),
    "no document index": (lambda d: put(d, 26, 0, "<Q"), "no document index"),
    "length": (lambda d: put(d, 38, 6, "<i"), "sequence 2 is corrupt"),
    "negative length": (lambda d: put(d, 34, -3, "<i"), "sequence 0 is corrupt"),
    "last length": (lambda d: put(d, 46, 5, "<i"), "has 28 bytes where"),
    "offset": (lambda d: put(d, 58, 8, "<q"), "sequence 1 is corrupt"),
    "document index": (lambda d: put(d, 98, 4, "<q"), "document 3 is corrupt"),
    "first document": (lambda d: put(d, 82, 1, "<q"), "do not span"),
    "last document": (lambda d: put(d, 122, 3, "<q"), "do not span"),
}


@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_damaged_index_is_refused(shard, fault):
    change, message = IDX_FAULTS[fault]
    edit(shard.with_suffix(".idx"), change)
    with pytest.raises(UserError, match=message) as caught:
        IndexedReader(shard)
    assert str(shard) in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[:-2], lambda d: d + b"\0\0"])
def test_bin_of_another_size_is_refused(shard, change):
    edit(shard.with_suffix(".bin"), change)
    with pytest.raises(UserError, match="belongs to another"):
        IndexedReader(shard)


def test_index_of_another_shard_is_refused(shard, tmp_path):
    write_shard(tmp_path / "b", [3, 4])
    (tmp_path / "b.idx").replace(tmp_path / "a.idx")
    with pytest.raises(UserError, match="belongs to another"):
        IndexedReader(shard)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(shard, suffix):
    shard.with_suffix(suffix).unlink()
    with pytest.raises(UserError, match="missing") as caught:
        IndexedReader(shard)
    assert caught.value.where.endswith(f"a{suffix}")


def test_shard_without_tokens_is_refused(tmp_path):
    write_shard(tmp_path / "a", [0, 0])
    with pytest.raises(UserError, match="no tokens"):
        IndexedReader(tmp_path / "a")


def write_and_fail(prefix):
    with IndexedWriter(prefix, 100) as writer:
        writer.add_document([1, 2])
        raise ZeroDivisionError


def test_writer_leaves_nothing_when_the_block_raises(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_that_fails_keeps_the_old_shard(shard):
    before = shard.with_suffix(".bin").read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_and_fail(shard)
    assert shard.with_suffix(".bin").read_bytes() == before
    assert IndexedReader(shard).documents == 5


def test_nothing_has_its_final_name_before_publish(tmp_path):
    writer = IndexedWriter(tmp_path / "a", 100)
    writer.add_document([1, 2])
    writer.seal()
    assert {p.suffix for p in tmp_path.iterdir()} == {".tmp"}
    writer.publish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("tokens", [[100], [-1], [1, 65536 + 5]])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path, tokens):
    # 65541 would wrap to 5 in uint16 and be a valid id.
    with pytest.raises(ValueError, match="outside"), IndexedWriter(tmp_path / "a", 100) as writer:
        writer.add_document(tokens)


def test_writer_refuses_lengths_that_do_not_add_up(tmp_path):
    with pytest.raises(ValueError, match="add up"), IndexedWriter(tmp_path / "a", 100) as writer:
        writer.add_documents(np.array([1, 2, 3]), [1, 1])
