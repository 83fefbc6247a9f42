"""Megatron's indexed format, `.bin` + `.idx`: written byte for byte alike, and read with suspicion.

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

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from litespark.errors import UserError
from litespark.utils.files import HashingFile, rename_durably, temporary_name

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
ROWS_AT_ONCE = 1 << 20  # index rows converted or checked at a time, to bound memory

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


@dataclass(frozen=True)
class ShardFiles:
    """What a sealed writer has on disk: sizes in bytes, SHA-256 digests, and counts."""

    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    documents: int
    empty_documents: int
    tokens: int


class IndexedWriter:
    """Stream documents to `<prefix>.bin` and `<prefix>.idx`, which appear whole or not at all.

    Used as a context manager, it publishes when the block ends and leaves nothing when it raises.
    To put something between the two (a manifest), call `seal` and `publish` yourself.  Memory: 4
    bytes a document.

    Args:
        prefix: path without suffix; its folder must exist.
        vocab_size: decides the stored type; ids at or above it are refused.
    """

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int) -> None:
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self.dtype = np.dtype(token_type(vocab_size))
        self.tokens = 0
        self._lengths = array("i")
        self._sealed: ShardFiles | None = None
        self._bin = HashingFile(temporary_name(bin_path(prefix)))
        self._idx: HashingFile | None = None

    def add_document(self, tokens: Sequence[int] | TokenArray) -> None:
        """Append one document; an empty one keeps its place in the count of documents.

        Raises:
            ValueError: when an id is outside [0, vocab_size).
            OSError: when the disk is full.
        """
        self.add_documents(np.asarray(tokens, dtype=np.int64), [len(tokens)])

    def add_documents(self, tokens: TokenArray, lengths_tokens: Sequence[int] | TokenArray) -> None:
        """Append documents given as one array of ids [sum of lengths] and the length of each.

        Raises:
            ValueError: when the lengths do not add up or an id is outside [0, vocab_size).
            OSError: when the disk is full.
        """
        lengths = np.asarray(lengths_tokens, dtype=np.int32)
        if int(lengths.sum(dtype=np.int64)) != tokens.size or bool((lengths < 0).any()):
            raise ValueError(f"lengths add up to {lengths.sum()} tokens, {tokens.size} were given")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"token ids span {tokens.min()}..{tokens.max()}, outside [0, {self.vocab_size})"
            )
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.frombytes(lengths.tobytes())
        self.tokens += tokens.size

    def seal(self) -> ShardFiles:
        """Write the index and force both files to the disk, still under temporary names.

        Raises:
            OSError: when the disk is full.
        """
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        self._idx = HashingFile(temporary_name(idx_path(self.prefix)))
        write_index(self._idx, lengths, self.dtype)
        self._sealed = ShardFiles(
            bin_bytes=self._bin.size_bytes,
            bin_sha256=self._bin.close_durably(),
            idx_bytes=self._idx.size_bytes,
            idx_sha256=self._idx.close_durably(),
            documents=len(lengths),
            empty_documents=int(np.count_nonzero(lengths == 0)),
            tokens=self.tokens,
        )
        return self._sealed

    def publish(self) -> None:
        """Give the sealed files their names: `.bin` first, `.idx` last, so an index is never alone.

        Raises:
            OSError: when a rename fails.
        """
        if self._sealed is None or self._idx is None:
            raise RuntimeError("seal() comes before publish()")
        # An index of an earlier shard must not meet the new .bin, not even for a moment.
        with suppress(FileNotFoundError):
            idx_path(self.prefix).unlink()
        rename_durably(self._bin.path, bin_path(self.prefix))
        rename_durably(self._idx.path, idx_path(self.prefix))

    def discard(self) -> None:
        """Remove what has been written; nothing to do after `publish`."""
        self._bin.discard()
        if self._idx is not None:
            self._idx.discard()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.seal()
                self.publish()
        finally:
            self.discard()


def pack_header(dtype: np.dtype[Any], sequences: int, entries: int) -> bytes:
    """Return the header of an `.idx` with S `sequences` and D `entries`."""
    return _HEADER.pack(MAGIC, VERSION, _CODE_OF_TYPE[dtype.type], sequences, entries)


def write_index(file: HashingFile, lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """Write the header and the tables of `.idx`; `lengths` [documents], 0 for an empty one.

    Raises:
        OSError: when the disk is full.
    """
    sequences = int(np.count_nonzero(lengths))
    file.write(pack_header(dtype, sequences, len(lengths) + 1))
    blocks = [lengths[i : i + ROWS_AT_ONCE] for i in range(0, len(lengths), ROWS_AT_ONCE)]
    for block in blocks:
        file.write(block[block > 0].astype("<i4").tobytes())
    offset_bytes = 0
    for block in blocks:
        sizes = block[block > 0].astype(np.int64) * dtype.itemsize
        ends = offset_bytes + np.cumsum(sizes)
        file.write((ends - sizes).astype("<i8").tobytes())
        offset_bytes = int(ends[-1]) if ends.size else offset_bytes
    first_sequence = 0
    file.write(struct.pack("<q", 0))
    for block in blocks:
        indices = first_sequence + np.cumsum(block > 0, dtype=np.int64)
        file.write(indices.astype("<i8").tobytes())
        first_sequence = int(indices[-1])


class IndexedReader:
    """Read documents of a shard through memory maps; safe to fork, and pickled as its prefix.

    Attributes:
        documents, tokens: counts; `dtype`: the stored type.
        document_lengths_tokens: int64 [documents], 0 for an empty document.

    Raises:
        UserError: when a file is missing, is not such a file, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        index = open_index(self.prefix)
        if index.tokens == 0:
            where = str(bin_path(self.prefix))
            raise UserError(where, "the shard holds no tokens", "Use one with documents.")
        self.dtype = index.dtype
        self._tokens = np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r")
        self.tokens = len(self._tokens)
        starts = np.zeros(len(index.lengths) + 1, dtype=np.int64)
        np.cumsum(index.lengths, out=starts[1:])
        self._document_starts = starts[index.document_indices]
        self.documents = index.documents
        self.document_lengths_tokens: npt.NDArray[np.int64] = np.diff(self._document_starts)

    def read(self, document: int, start: int = 0, length: int | None = None) -> TokenArray:
        """Return a view of `length` tokens of a document from `start`, to its end when None.

        Raises:
            IndexError: when the document or the span is outside the shard.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        available = int(self.document_lengths_tokens[document]) - start
        wanted = available if length is None else length
        if start < 0 or not 0 <= wanted <= available:
            raise IndexError(f"tokens {start}..{start + wanted} of document {document}")
        first = int(self._document_starts[document]) + start
        return self._tokens[first : first + wanted]

    def __getstate__(self) -> dict[str, str]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["prefix"])


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


@dataclass(frozen=True)
class ShardIndex:
    """The checked tables of an `.idx`, memory-mapped: `lengths` [S] in tokens, `pointers` [S] in
    bytes, `document_indices` [D].
    """

    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]
    bin_bytes: int

    @property
    def documents(self) -> int:
        """Documents, the empty ones included."""
        return len(self.document_indices) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return self.bin_bytes // self.dtype.itemsize

    def document_lengths(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the documents' lengths in tokens, in order, some at a time to bound memory."""
        for first in range(0, self.documents, ROWS_AT_ONCE):
            sequences = self.document_indices[first : first + ROWS_AT_ONCE + 1]
            starts = np.full(len(sequences), self.bin_bytes, dtype=np.int64)
            inside = sequences < len(self.pointers)  # past the last sequence is the end of .bin
            starts[inside] = self.pointers[sequences[inside]]
            yield np.diff(starts) // self.dtype.itemsize


def open_index(prefix: str | os.PathLike[str]) -> ShardIndex:
    """Map the index of a shard after all checks of its structure; the shard may hold no tokens.

    Raises:
        UserError: when a file is missing, is not such a file, or the two do not belong together.
        OSError: when a file is there but cannot be read.
    """
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
    table = np.memmap(path, dtype=np.uint8, mode="r")
    lengths = table[HEADER_BYTES : HEADER_BYTES + 4 * sequences].view("<i4")
    pointers_end = HEADER_BYTES + 12 * sequences
    pointers = table[HEADER_BYTES + 4 * sequences : pointers_end].view("<i8")
    documents = table[pointers_end:].view("<i8")
    total_bytes = _check_pointers(path, lengths, pointers, dtype.itemsize)
    _check_document_indices(path, documents, sequences)
    if total_bytes != data_bytes:
        raise UserError(
            str(data_path),
            f"has {data_bytes} bytes where {path.name} describes {total_bytes}: "
            "it is cut short, has grown, or the .idx belongs to another .bin",
            "Put the two files of one shard together again, or write the shard again.",
        )
    return ShardIndex(dtype, lengths, pointers, documents, data_bytes)


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


def _check_pointers(path: Path, lengths: Any, pointers: Any, itemsize: int) -> int:
    """Return the bytes that the sequences take, after checking each offset against the lengths."""
    offset_bytes = 0
    for first in range(0, len(lengths), ROWS_AT_ONCE):
        sizes = lengths[first : first + ROWS_AT_ONCE].astype(np.int64) * itemsize
        ends = offset_bytes + np.cumsum(sizes)
        wrong = (sizes < 0) | (pointers[first : first + ROWS_AT_ONCE] != ends - sizes)
        if wrong.any():
            sequence = first + int(np.argmax(wrong))
            raise _damaged(path, f"the length or offset of sequence {sequence} is corrupt")
        offset_bytes = int(ends[-1])
    return offset_bytes


def _check_document_indices(path: Path, documents: Any, sequences: int) -> None:
    if documents[0] != 0 or documents[-1] != sequences:
        raise _damaged(path, f"its document indices do not span the {sequences} sequences")
    for first in range(0, len(documents) - 1, ROWS_AT_ONCE):
        steps = np.diff(documents[first : first + ROWS_AT_ONCE + 1])
        if (steps < 0).any():
            document = first + int(np.argmax(steps < 0))
            raise _damaged(path, f"the index of document {document + 1} is corrupt (it goes back)")
