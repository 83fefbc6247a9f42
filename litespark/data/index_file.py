"""Megatron's indexed format, `.bin` + `.idx`: its layout, and how it is read with suspicion.

`.bin` is the token ids of all documents one after another, no header.  `.idx`, little-endian:

    9 bytes   MMIDIDX\\0\\0
    u64       version = 1
    u8        code of the token type (8 uint16, 4 int32)
    u64, u64  S, sequences; D, document indices = documents + 1
    S x i32   length of each sequence in tokens
    S x i64   its offset in `.bin` in bytes
    D x i64   first sequence of each document, and S at the end

so its size is 34 + 12 S + 8 D.  An empty document repeats a document index and has no sequence.
The format has no checksum; the reader therefore recomputes every redundancy it does have (sizes,
offsets from lengths, order of the document indices), which is what stands between a wrong file
and silent nonsense.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from litespark.data.storage import is_remote
from litespark.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
_HEADER = struct.Struct("<9sQBQQ")
# Floats (codes 6 and 7) belong to the format but cannot be token ids.
_TYPE_OF_CODE: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODE_OF_TYPE = {token_type: code for code, token_type in _TYPE_OF_CODE.items()}
_MAX_UINT16_VOCAB_SIZE = 65500  # exclusive; megatron-core's bound, not 65536
ROWS_AT_ONCE = 1 << 18  # index rows converted or checked at a time, to bound memory

TokenArray = npt.NDArray[np.integer[Any]]


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Return `<prefix>.bin`."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Return `<prefix>.idx`."""
    return Path(f"{os.fspath(prefix)}.idx")


def token_type(vocab_size: int) -> type[np.integer[Any]]:
    """Return the type that megatron-core stores ids of this vocabulary in: uint16 or int32."""
    return np.uint16 if vocab_size < _MAX_UINT16_VOCAB_SIZE else np.int32


def pack_header(dtype: np.dtype[Any], sequences: int, entries: int) -> bytes:
    """Return the header of an `.idx` with S `sequences` and D `entries`."""
    return _HEADER.pack(MAGIC, VERSION, _CODE_OF_TYPE[dtype.type], sequences, entries)


def _file_size(path: Path, prefix: str) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            str(path),
            "the file of this shard is missing" if not path.exists() else str(error.strerror),
            f"Give the prefix of an existing pair {prefix}.bin and {prefix}.idx "
            "(without the suffix), or write it with litespark preprocess.",
        ) from error


def map_file(path: Path) -> mmap.mmap:
    """Map a file that is not empty, to be read only.

    Raises:
        OSError: when it cannot be read.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The checked tables of an `.idx`, memory-mapped: `lengths` [S] in tokens, `pointers` [S] in
    bytes, `document_indices` [D]; `mapped` is what they are views of.
    """

    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]
    bin_bytes: int
    mapped: mmap.mmap

    @property
    def documents(self) -> int:
        """Documents, the empty ones included."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return self.bin_bytes // self.dtype.itemsize

    def token_start(self, document: int) -> int:
        """Return where a document starts in `.bin`, in tokens; `documents` gives the end."""
        sequence = int(self.document_indices[document])
        if sequence == len(self.pointers):  # past the last sequence is the end of .bin
            return self.tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def document_lengths(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the lengths in tokens of the documents [start, stop), some at a time."""
        stop = self.documents if stop is None else stop
        for first in range(start, stop, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, stop)
            sequences = self.document_indices[first : last + 1]
            starts = np.full(len(sequences), self.bin_bytes, dtype=np.int64)
            inside = sequences < len(self.pointers)
            starts[inside] = self.pointers[sequences[inside]]
            yield np.diff(starts) // self.dtype.itemsize
            forget_pages(self.mapped)


def forget_pages(mapped: mmap.mmap) -> None:
    """Take a map's pages out of this process's memory after a scan; they stay in the cache."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def open_index(prefix: str | os.PathLike[str]) -> ShardIndex:
    """Map the index of a shard after all checks of its structure; the shard may hold no tokens.

    Raises:
        UserError: when a file is missing, is not such a file, or the two do not belong together.
        OSError: when a file is there but cannot be read.
    """
    if is_remote(prefix):
        raise UserError(
            os.fspath(prefix),
            "is in a store, and shards are read from the disk",
            f"Fetch it first: litespark data copy {os.fspath(prefix)} FOLDER.",
        )
    path, data_path = idx_path(prefix), bin_path(prefix)
    size_bytes, data_bytes = (_file_size(file, os.fspath(prefix)) for file in (path, data_path))
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    dtype, sequences, entries = _parse_header(path, header)
    expected = HEADER_BYTES + 12 * sequences + 8 * entries
    if size_bytes != expected:
        problem = "it is cut short" if size_bytes < expected else "something follows its end"
        raise _damaged(
            path, f"has {size_bytes} bytes where its header asks for {expected}: {problem}"
        )
    mapped = map_file(path)
    offset = HEADER_BYTES
    lengths = np.frombuffer(mapped, "<i4", sequences, offset)
    pointers = np.frombuffer(mapped, "<i8", sequences, offset + 4 * sequences)
    documents = np.frombuffer(mapped, "<i8", entries, offset + 12 * sequences)
    index = ShardIndex(dtype, lengths, pointers, documents, data_bytes, mapped)
    total_bytes = _check_pointers(path, index)
    _check_document_indices(path, index)
    if total_bytes != data_bytes:
        raise UserError(
            str(data_path),
            f"has {data_bytes} bytes where {path.name} describes {total_bytes}: "
            "it is cut short, has grown, or the .idx belongs to another .bin",
            "Put the two files of one shard together again, or write the shard again.",
        )
    return index


def unreadable_shard(prefix: str | os.PathLike[str], error: OSError) -> UserError:
    """Return what to tell the user about a shard whose files the system does not let us read."""
    return UserError(
        str(error.filename or prefix),
        f"cannot be read ({error.strerror or error})",
        "Name a shard's prefix, and check that you may read its files.",
    )


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(str(path), problem, "Copy the file again, or write the shard again.")


def _parse_header(path: Path, header: bytes) -> tuple[np.dtype[Any], int, int]:
    if not header.startswith(MAGIC):
        raise UserError(
            str(path),
            "is not a Megatron index (it does not begin with MMIDIDX)",
            "Give the prefix of a shard written by litespark preprocess or Megatron-LM.",
        )
    if len(header) < HEADER_BYTES:
        raise _damaged(path, f"ends inside its header, after {len(header)} bytes")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    if version != VERSION:
        raise _damaged(path, f"has version {version}; only version {VERSION} is known")
    if code not in _TYPE_OF_CODE:
        raise _damaged(path, f"has the type code {code}, which is no integer type")
    if entries < 1:
        raise _damaged(path, "has no document index")
    return np.dtype(_TYPE_OF_CODE[code]), sequences, entries


def _check_pointers(path: Path, index: ShardIndex) -> int:
    """Return the bytes that the sequences take, after checking each offset against the lengths."""
    offset_bytes = 0
    for first in range(0, len(index.lengths), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        sizes = index.lengths[rows].astype(np.int64) * index.dtype.itemsize
        ends = offset_bytes + np.cumsum(sizes)
        wrong = (sizes < 0) | (index.pointers[rows] != ends - sizes)
        if wrong.any():
            sequence = first + int(np.argmax(wrong))
            raise _damaged(path, f"the length or offset of sequence {sequence} is corrupt")
        offset_bytes = int(ends[-1])
        forget_pages(index.mapped)
    return offset_bytes


def _check_document_indices(path: Path, index: ShardIndex) -> None:
    documents, sequences = index.document_indices, len(index.lengths)
    if documents[0] != 0 or documents[-1] != sequences:
        raise _damaged(path, f"its document indices do not span the {sequences} sequences")
    for first in range(0, len(documents) - 1, ROWS_AT_ONCE):
        block = documents[first : first + ROWS_AT_ONCE + 1]
        goes_back = block[1:] < block[:-1]
        if goes_back.any():
            document = first + int(np.argmax(goes_back))
            raise _damaged(path, f"the index of document {document + 1} is corrupt (it goes back)")
        forget_pages(index.mapped)
