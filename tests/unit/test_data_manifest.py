"""The manifest tells a changed shard, and a manifest that is not one is refused."""

from __future__ import annotations

import json

import pytest

from litespark.data.indexed import IndexedWriter
from litespark.data.manifest import (
    Manifest,
    SourceRecord,
    TokenizerRecord,
    manifest_path,
    read_manifest,
    write_manifest,
)
from litespark.data.verify import verify_shard
from litespark.errors import UserError


@pytest.fixture
def shard(tmp_path):
    writer = IndexedWriter(tmp_path / "a", 600)
    writer.add_document(list(range(100)))
    manifest = Manifest(
        tokenizer=TokenizerRecord("0" * 64, "tokenizer.json", 600, None),
        append_eod=False,
        json_key="text",
        sources=(SourceRecord("a.jsonl", 10, 1),),
        files=writer.seal(),
        skipped_bad_lines=0,
        replaced_surrogates=0,
        litespark_version="0",
    )
    writer.publish()
    write_manifest(tmp_path / "a", manifest)
    assert read_manifest(tmp_path / "a") == manifest == verify_shard(str(tmp_path / "a")).manifest
    return tmp_path / "a"


def test_shard_without_a_manifest_has_nothing_to_verify(shard):
    manifest_path(shard).unlink()
    assert read_manifest(shard) is None
    assert verify_shard(str(shard)).manifest is None


def test_flipped_bit_is_told_by_the_manifest(shard):
    content = bytearray(shard.with_suffix(".bin").read_bytes())
    content[10] ^= 1
    shard.with_suffix(".bin").write_bytes(content)
    with pytest.raises(UserError, match="not those that preprocess wrote"):
        verify_shard(str(shard))


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v | {"format_version": 3},
        lambda v: v | {"surprise": 1},
        lambda v: {k: v[k] for k in v if k != "sources"},
        lambda v: v | {"tokenizer": v["tokenizer"] | {"vocab_size": "600"}},
        lambda v: v | {"append_eod": 1},
        lambda v: [v],
    ],
)
def test_wrong_manifest_is_refused(shard, change):
    path = manifest_path(shard)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(shard)


def test_manifest_of_the_first_format_is_read(shard):
    path = manifest_path(shard)
    value = json.loads(path.read_text()) | {"format_version": 1}
    for name in ("prepend_bos", "split_by", "subset"):
        del value[name]
    del value["sources"][0]["sha256"]
    path.write_text(json.dumps(value))
    manifest = read_manifest(shard)
    assert manifest is not None
    assert (manifest.prepend_bos, manifest.sources[0].sha256) == (False, None)
