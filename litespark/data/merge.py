"""Several shards to one, byte for byte what one job over all their inputs would have written.

`.bin` files are joined as they are.  Of the `.idx` files the lengths are joined, offsets grow by
the bytes before them and document indices by the sequences before them; the tables are written
block by block, so memory does not grow with the shards.  Each `.bin` is compared with its
manifest's digest while it is copied: a damaged shard must not get a fresh, valid checksum.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from litespark.data.index_file import (
    ROWS_AT_ONCE,
    ShardIndex,
    bin_path,
    forget_pages,
    idx_path,
    pack_header,
    unreadable_shard,
)
from litespark.data.indexed import ShardFiles
from litespark.data.manifest import FORMAT_VERSION, Manifest
from litespark.data.output import (
    check_output_name,
    disk_error,
    prepare_folder,
    refuse_existing,
    unusable_output,
)
from litespark.data.publish import publish_shard
from litespark.data.verify import bin_blocks, changed_bytes, check_index_digest, open_shard
from litespark.errors import UserError
from litespark.utils.files import HashingFile, temporary_name
from litespark.version import __version__


@dataclass(frozen=True, eq=False)
class _Input:
    prefix: str
    index: ShardIndex
    manifest: Manifest | None


@dataclass(frozen=True)
class MergedShard:
    """What was written: sizes and counts, and the manifest (None: an input has none)."""

    files: ShardFiles
    manifest: Manifest | None


def merge_shards(
    inputs: Sequence[str],
    output_prefix: str,
    begin: Callable[[int], None] = lambda total_bytes: None,
    report: Callable[[int], None] = lambda written_bytes: None,
) -> MergedShard:
    """Join shards, in the order given, into the shard `output_prefix`, whole or not at all.

    Args:
        inputs: prefixes of at least one shard.
        output_prefix: the new shard's path without `.bin`.
        begin: called once, with the number of bytes of `.bin` to copy.
        report: called with the number of bytes of each block copied.

    Raises:
        UserError: when a shard is damaged, they do not go together, or the output is there
            already or cannot be made.
        LitesparkError: when the disk is full.
    """
    check_output_name(output_prefix)
    shards = [_open_input(prefix) for prefix in inputs]
    _check_agreement(shards)
    prepare_folder(output_prefix, output_prefix)
    refuse_existing(output_prefix, output_prefix)
    begin(sum(shard.index.bin_bytes for shard in shards))
    try:
        bin_file = HashingFile(temporary_name(bin_path(output_prefix)))
    except OSError as error:
        raise unusable_output(output_prefix, output_prefix, error) from error
    idx_file: HashingFile | None = None
    try:
        for shard in shards:
            _copy_tokens(shard, bin_file, report)
        idx_file = HashingFile(temporary_name(idx_path(output_prefix)))
        _write_tables([shard.index for shard in shards], idx_file)
        files = _seal(shards, bin_file, idx_file)
        manifest = _merged_manifest(shards, files)
        publish_shard(output_prefix, manifest, bin_file, idx_file)
        return MergedShard(files, manifest)
    except OSError as error:  # inputs raise UserError, so what is left is the output
        raise disk_error(output_prefix, error) from error
    finally:
        bin_file.discard()
        if idx_file is not None:
            idx_file.discard()


def shards_in(folder: str) -> list[str]:
    """Return the prefixes of all shards in a folder, sorted by name, as Megatron-LM's tool does.

    Raises:
        UserError: when it is no folder, holds no shard, or half of one.
    """
    where = f"--input {folder}"
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise UserError(
            where, f"is no folder that can be read ({error.strerror})", "Name a folder of shards."
        ) from error
    stems = sorted({Path(name).stem for name in names if name.endswith((".bin", ".idx"))})
    for stem in stems:
        for suffix in (".bin", ".idx"):
            if f"{stem}{suffix}" not in names:
                raise UserError(
                    where,
                    f"holds one file of the shard {stem} and lacks {stem}{suffix}",
                    "Complete the shard, or move its file elsewhere.",
                )
    if not stems:
        raise UserError(where, "holds no .bin with its .idx", "Name a folder of shards.")
    return [os.path.join(folder, stem) for stem in stems]


def _open_input(prefix: str) -> _Input:
    try:
        index, manifest = open_shard(prefix)
        check_index_digest(prefix, manifest)
    except OSError as error:
        raise unreadable_shard(prefix, error) from error
    return _Input(prefix, index, manifest)


def _check_agreement(shards: Sequence[_Input]) -> None:
    seen: set[str] = set()
    for shard in shards:
        real_path = os.path.realpath(shard.prefix)
        if real_path in seen:
            raise UserError(
                f"--input {shard.prefix}",
                "the shard is named twice, and its documents would be counted twice",
                "Name each shard once; to see one more often, raise its weight in the blend.",
            )
        seen.add(real_path)
    first = shards[0]
    for shard in shards[1:]:
        if shard.index.dtype != first.index.dtype:
            raise UserError(
                f"--input {shard.prefix}",
                f"holds {shard.index.dtype.name} tokens, {first.prefix} holds "
                f"{first.index.dtype.name}",
                "Merge shards of one tokenizer.",
            )
    _check_manifests([shard for shard in shards if shard.manifest is not None])


def _check_manifests(shards: Sequence[_Input]) -> None:
    """Compare those that have one, also when the merged shard gets none for lack of others."""
    for shard in shards[1:]:
        one, other = shards[0].manifest, shard.manifest
        if one is None or other is None:
            continue
        if one.tokenizer.identity != other.tokenizer.identity:
            raise UserError(
                f"--input {shard.prefix}",
                f"was written with the tokenizer of SHA-256 {other.tokenizer.identity[:12]}, "
                f"{shards[0].prefix} with {one.tokenizer.identity[:12]}",
                "Merge shards of one tokenizer.",
            )
        if _frame(one) != _frame(other):
            raise UserError(
                f"--input {shard.prefix}",
                f"was written {_frame(other)}, {shards[0].prefix} {_frame(one)}",
                "Merge shards with one rule for the starts and ends of documents.",
            )


def _frame(manifest: Manifest) -> str:
    start = "with" if manifest.prepend_bos else "without"
    end = "with" if manifest.append_eod else "without"
    return f"{start} begin-of-text tokens and {end} end-of-text tokens"


def _copy_tokens(shard: _Input, file: HashingFile, report: Callable[[int], None]) -> None:
    digest, copied_bytes = hashlib.sha256(), 0
    for block in _read_blocks(shard.prefix):
        digest.update(block)
        file.write(block)
        copied_bytes += len(block)
        report(len(block))
    intact = copied_bytes == shard.index.bin_bytes
    if shard.manifest is not None:
        intact = intact and digest.hexdigest() == shard.manifest.files.bin_sha256
    if not intact:
        raise changed_bytes(bin_path(shard.prefix))


def _read_blocks(prefix: str) -> Iterator[bytes]:
    """Yield the blocks of `.bin`; an error while reading is the input's, not the output's."""
    blocks = bin_blocks(prefix)
    while True:
        try:
            block = next(blocks)
        except StopIteration:
            return
        except OSError as error:
            raise unreadable_shard(prefix, error) from error
        yield block


def _write_tables(indices: Sequence[ShardIndex], file: HashingFile) -> None:
    sequences = sum(len(index.lengths) for index in indices)
    documents = sum(index.documents for index in indices)
    file.write(pack_header(indices[0].dtype, sequences, documents + 1))
    for index in indices:
        for block in _blocks(index, index.lengths):
            file.write(block.tobytes())
    offset_bytes = 0
    for index in indices:
        for block in _blocks(index, index.pointers):
            file.write((block + offset_bytes).astype("<i8").tobytes())
        offset_bytes += index.bin_bytes
    file.write(struct.pack("<q", 0))
    first_sequence = 0
    for index in indices:
        for block in _blocks(index, index.document_indices[1:]):
            file.write((block + first_sequence).astype("<i8").tobytes())
        first_sequence += len(index.lengths)


def _blocks(index: ShardIndex, table: npt.NDArray[np.integer]) -> Iterator[npt.NDArray[np.integer]]:
    for first in range(0, len(table), ROWS_AT_ONCE):
        yield table[first : first + ROWS_AT_ONCE]
        forget_pages(index.mapped)


def _seal(shards: Sequence[_Input], bin_file: HashingFile, idx_file: HashingFile) -> ShardFiles:
    indices = [shard.index for shard in shards]
    empty = sum(
        int(np.count_nonzero(lengths == 0))
        for index in indices
        for lengths in index.document_lengths()
    )
    return ShardFiles(
        bin_bytes=bin_file.size_bytes,
        bin_sha256=bin_file.close_durably(),
        idx_bytes=idx_file.size_bytes,
        idx_sha256=idx_file.close_durably(),
        documents=sum(index.documents for index in indices),
        empty_documents=empty,
        tokens=sum(index.tokens for index in indices),
    )


def _merged_manifest(shards: Sequence[_Input], files: ShardFiles) -> Manifest | None:
    """The first shard's manifest with all sources and sums; None when a shard has none."""
    manifests = [shard.manifest for shard in shards if shard.manifest is not None]
    if len(manifests) < len(shards):
        return None
    return replace(
        manifests[0],
        json_key=",".join(dict.fromkeys(manifest.json_key for manifest in manifests)),
        sources=tuple(source for manifest in manifests for source in manifest.sources),
        files=files,
        skipped_bad_lines=sum(manifest.skipped_bad_lines for manifest in manifests),
        replaced_surrogates=sum(manifest.replaced_surrogates for manifest in manifests),
        litespark_version=__version__,
        split_by=_common({manifest.split_by for manifest in manifests}),
        subset=_common({manifest.subset for manifest in manifests}),
        format_version=FORMAT_VERSION,
    )


def _common(values: set[str | None]) -> str | None:
    """What all inputs share, None where they differ."""
    return values.pop() if len(values) == 1 else None
