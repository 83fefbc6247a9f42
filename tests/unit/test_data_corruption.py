"""Each way a shard is known to go wrong ends `litespark data verify` with 2 and the file's name.

The first nine are those that were injected into Megatron-LM's reader, which served five of them
without a word and two more until the last documents were read.
"""

from __future__ import annotations

import shutil
import struct

import numpy as np
import pytest

from litespark.cli.main import main
from litespark.data.blend import open_blend
from litespark.data.indexed import IndexedReader, IndexedWriter
from litespark.data.manifest import (
    Manifest,
    SourceRecord,
    TokenizerRecord,
    manifest_path,
    read_manifest,
    write_manifest,
)
from litespark.errors import UserError

VOCAB_SIZE = 32000
# Two shards of one size, so that the index of one fits the other's .bin.
DOCUMENTS = 100
TOKENS = 600_000  # of 2 bytes: more than the megabyte that is cut off


def write(prefix, seed):
    generator = np.random.default_rng(seed)
    ends = np.sort(generator.choice(TOKENS - 1, DOCUMENTS - 1, replace=False)) + 1
    writer = IndexedWriter(prefix, VOCAB_SIZE)
    writer.add_documents(
        generator.integers(0, VOCAB_SIZE, TOKENS), np.diff([0, *ends.tolist(), TOKENS])
    )
    files = writer.seal()
    writer.publish()
    tokenizer = TokenizerRecord("0" * 64, "tokenizer.model", VOCAB_SIZE, 2)
    sources = (SourceRecord("a.jsonl", 10, DOCUMENTS),)
    write_manifest(prefix, Manifest(tokenizer, False, "text", sources, files, 0, 0, "0"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "a", 0)
    write(folder / "other", 1)
    return folder


@pytest.fixture
def shard(written, tmp_path):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(written / f"a{suffix}", tmp_path)
    return tmp_path / "a"


def change(shard, suffix, edit):
    path = shard.with_suffix(suffix)
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(edit(content)))
    return path


def flip(offset, bit):
    def edit(content):
        content[offset] ^= 1 << bit
        return content

    return edit


LENGTHS, POINTERS = 34, 34 + 4 * DOCUMENTS
# suffix, edit, message, is it found when the shard is opened, without reading all bytes?
CORRUPTIONS = {
    "idx cut short": (".idx", lambda c: c[:-100], "cut short", True),
    "bin empty": (".bin", lambda c: b"", "cut short", True),
    "bin short by a byte": (".bin", lambda c: c[:-1], "cut short", True),
    "bin short by a megabyte": (".bin", lambda c: c[: -(1 << 20)], "cut short", True),
    "bit in bin": (".bin", flip(500_001, 7), "not those that preprocess wrote", False),
    "bit in a length": (".idx", flip(LENGTHS + 4 * 50, 3), "sequence 51 is corrupt", True),
    "bit in a pointer": (".idx", flip(POINTERS + 8 * 50, 3), "sequence 50 is corrupt", True),
    "garbage after idx": (".idx", lambda c: c + b"x" * 999, "follows its end", True),
    "garbage after bin": (".bin", lambda c: c + b"x" * 999, "has grown", True),
}


def verify(capsys, *arguments):
    code = main(["data", "verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_shard_is_whole_before_it_is_damaged(capsys, shard):
    code, out, errors = verify(capsys, shard)
    assert (code, errors) == (0, "")
    assert out == f"{shard}: 100 documents, 600,000 tokens, checksums match, ids below 32,000\n"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_found(capsys, shard, name):
    suffix, edit, message, is_found_on_open = CORRUPTIONS[name]
    path = change(shard, suffix, edit)
    code, out, errors = verify(capsys, shard)
    assert (code, out) == (2, "")
    assert errors.startswith(f"litespark: error: {path}: ")
    assert message in errors
    if is_found_on_open:
        with pytest.raises(UserError, match=message) as caught:
            IndexedReader(shard)
        assert caught.value.where == str(path)


def test_index_of_another_shard_of_the_same_size_is_found(capsys, shard, written):
    shutil.copy(written / "other.idx", shard.with_suffix(".idx"))
    assert IndexedReader(shard).documents == DOCUMENTS  # its structure is right
    code, _, errors = verify(capsys, shard)
    assert code == 2
    assert errors.startswith(f"litespark: error: {shard}.idx: its bytes are not those")


def test_index_of_another_shard_with_other_counts_is_refused_by_a_run(shard, tmp_path):
    with IndexedWriter(tmp_path / "fewer", VOCAB_SIZE) as writer:
        writer.add_documents(np.zeros(TOKENS, dtype=np.int64), [TOKENS // 2, TOKENS // 2])
    shutil.copy(tmp_path / "fewer.idx", shard.with_suffix(".idx"))
    with pytest.raises(UserError, match=r"where the manifest beside it says") as caught:
        open_blend([(str(shard), 1.0)], (1.0, 0.0, 0.0), "train", 64, 1)
    assert caught.value.where == f"{shard}.idx"


def test_document_index_that_swallows_a_document_is_found(capsys, shard):
    """[.., 49, 50, 51, ..] to [.., 49, 51, 51, ..]: in order, and document 49 has two sequences."""
    at = POINTERS + 8 * DOCUMENTS + 8 * 50
    change(shard, ".idx", lambda c: c[:at] + struct.pack("<q", 51) + c[at + 8 :])
    assert IndexedReader(shard).documents == DOCUMENTS
    assert verify(capsys, shard)[0] == 2


def test_ids_beyond_the_vocabulary_are_found(capsys, shard):
    """The case of a wrong tokenizer: the checksums are right, the ids are not."""
    manifest = read_manifest(shard)
    assert manifest is not None
    path = manifest_path(shard)
    path.write_text(path.read_text().replace('"vocab_size": 32000', '"vocab_size": 31000'))
    code, out, errors = verify(capsys, shard)
    assert (code, out) == (2, "")
    ids = np.fromfile(shard.with_suffix(".bin"), dtype=np.uint16)
    place = int(np.argmax(ids >= 31000))
    lengths = IndexedReader(shard).document_lengths_tokens
    document = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
    assert errors.startswith(
        f"litespark: error: {shard}.bin: document {document} holds the token id {ids[place]:,}, "
        "which is outside its vocabulary of 31,000"
    )


def test_ids_of_a_shard_without_a_manifest_are_compared_with_the_option(capsys, shard):
    manifest_path(shard).unlink()
    code, out, _ = verify(capsys, shard)
    assert (code, "no manifest" in out, "ids below" in out) == (0, True, False)
    largest = int(np.fromfile(shard.with_suffix(".bin"), dtype=np.uint16).max())
    assert verify(capsys, shard, "--vocab-size", largest + 1)[0] == 0
    code, _, errors = verify(capsys, shard, "--vocab-size", largest)
    assert code == 2
    assert f"holds the token id {largest:,}" in errors
    assert verify(capsys, shard, "--vocab-size", 0)[0] == 2


def test_negative_id_is_found(capsys, tmp_path):
    with IndexedWriter(tmp_path / "a", 128_000) as writer:
        writer.add_documents(np.arange(50), [10, 0, 40])
    ids = np.fromfile(tmp_path / "a.bin", dtype=np.int32)
    ids[30] = -1
    ids.tofile(tmp_path / "a.bin")
    code, _, errors = verify(capsys, tmp_path / "a")
    assert code == 2
    assert "document 2 holds the token id -1, which is negative" in errors


def test_several_shards_are_all_checked_and_all_damage_is_told(capsys, shard, written):
    change(shard, ".bin", flip(7, 0))
    prefixes = [shard, written / "a", shard.with_name("missing"), written / "other"]
    code, out, errors = verify(capsys, *prefixes)
    assert code == 2
    assert [line.split(":")[0] for line in out.splitlines()] == [
        str(written / "a"),
        str(written / "other"),
    ]
    assert f"{shard}.bin: its bytes" in errors
    assert "missing.idx: the file of this shard is missing" in errors
