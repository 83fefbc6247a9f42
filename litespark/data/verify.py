"""Whether a shard is what was written, and fits its vocabulary: all of its bytes are read once.

Opening a shard checks the index's structure and both sizes, which is cheap and finds what breaks
the structure.  What leaves it intact (a bit flipped among the tokens, the index of a shard of the
same size) needs every byte: the SHA-256 digests of the manifest, and the ids themselves, none of
which may reach the vocabulary's size.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litespark.data.index_file import ShardIndex, bin_path, idx_path, open_index, unreadable_shard
from litespark.data.manifest import Manifest, read_manifest
from litespark.errors import UserError
from litespark.utils.files import sha256_of_file

BLOCK_BYTES = 1 << 22  # a multiple of every token type's size


@dataclass(frozen=True)
class VerifiedShard:
    """What a check found: counts, the manifest if there is one, the bound that all ids keep."""

    documents: int
    tokens: int
    manifest: Manifest | None
    vocab_size: int | None


def verify_shard(
    prefix: str,
    vocab_size: int | None = None,
    report: Callable[[int], None] = lambda read_bytes: None,
) -> VerifiedShard:
    """Read both files of a shard and compare them with each other, the manifest, the vocabulary.

    Args:
        prefix: the shard's path without `.bin`.
        vocab_size: ids must be below it; None for that of the manifest's tokenizer, if any.
        report: called with the number of bytes of each block read.

    Raises:
        UserError: when a file is missing, cannot be read or is damaged, or an id is too large.
    """
    try:
        index, manifest = open_shard(prefix)
        check_index_digest(prefix, manifest)
        if vocab_size is None and manifest is not None:
            vocab_size = manifest.tokenizer.vocab_size
        digest, problem = hashlib.sha256(), None
        position_tokens = 0
        for block in bin_blocks(prefix):
            digest.update(block)
            if problem is None:
                problem = _find_wrong_id(index, block, position_tokens, vocab_size)
            position_tokens += len(block) // index.dtype.itemsize
            report(len(block))
    except OSError as error:
        raise unreadable_shard(prefix, error) from error
    if manifest is not None and digest.hexdigest() != manifest.files.bin_sha256:
        raise changed_bytes(bin_path(prefix), f" ({problem})" if problem else "")
    if problem is not None:
        raise UserError(
            str(bin_path(prefix)), problem, "Write the shard again, with the model's tokenizer."
        )
    return VerifiedShard(index.documents, index.tokens, manifest, vocab_size)


def open_shard(prefix: str | os.PathLike[str]) -> tuple[ShardIndex, Manifest | None]:
    """Open a shard's index and manifest, if it has one, and compare the two; no token is read.

    Raises:
        UserError: when a file is missing or damaged, or they are not of one shard.
        OSError: when a file is there but cannot be read.
    """
    index, manifest = open_index(prefix), read_manifest(prefix)
    if manifest is not None:
        check_counts(prefix, index, manifest)
    return index, manifest


def check_index_digest(prefix: str | os.PathLike[str], manifest: Manifest | None) -> None:
    """Compare the bytes of `.idx` with the manifest's digest, where there is a manifest.

    Raises:
        UserError: when they have changed.
        OSError: when they cannot be read.
    """
    if manifest is not None and sha256_of_file(idx_path(prefix)) != manifest.files.idx_sha256:
        raise changed_bytes(idx_path(prefix))


def check_counts(prefix: str | os.PathLike[str], index: ShardIndex, manifest: Manifest) -> None:
    """Compare sizes and counts with the manifest's, without reading the tokens.

    Raises:
        UserError: when they differ, so that the files are not of one shard.
    """
    files = manifest.files
    idx_bytes = idx_path(prefix).stat().st_size
    for path, what, found, expected in (
        (bin_path(prefix), "bytes", index.bin_bytes, files.bin_bytes),
        (idx_path(prefix), "bytes", idx_bytes, files.idx_bytes),
        (idx_path(prefix), "documents", index.documents, files.documents),
        (bin_path(prefix), "tokens", index.tokens, files.tokens),
    ):
        if found != expected:
            raise UserError(
                str(path),
                f"has {found:,} {what} where the manifest beside it says {expected:,}",
                "Put the files of one shard together again, or write the shard again.",
            )


def bin_blocks(prefix: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yield the bytes of a shard's `.bin`, whole tokens at a time.

    Raises:
        OSError: when it cannot be read.
    """
    with open(bin_path(prefix), "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def changed_bytes(path: Path, detail: str = "") -> UserError:
    """Return the error for a file whose digest is not the manifest's."""
    return UserError(
        str(path),
        f"its bytes are not those that preprocess wrote{detail}",
        "Copy the file again, or write the shard again.",
    )


def _find_wrong_id(
    index: ShardIndex, block: bytes, position_tokens: int, vocab_size: int | None
) -> str | None:
    """Return what is wrong with the first id outside the vocabulary, if there is one."""
    ids = np.frombuffer(block, dtype=index.dtype)
    bound = np.iinfo(index.dtype).max + 1 if vocab_size is None else vocab_size
    if int(ids.min()) >= 0 and int(ids.max()) < bound:
        return None
    place = int(np.argmax((ids < 0) | (ids >= bound)))
    position = position_tokens + place
    document = bisect_right(range(index.documents), position, key=index.token_start) - 1
    outside = "is negative" if ids[place] < 0 else f"is outside its vocabulary of {bound:,}"
    return f"document {document} holds the token id {int(ids[place]):,}, which {outside}"
