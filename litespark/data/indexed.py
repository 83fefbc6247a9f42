"""Documents written to and read from a shard, Megatron's `.bin` + `.idx`, byte for byte alike.

`index_file` describes the two files.  The writer streams: it holds 4 bytes a document, and its
files appear whole or not at all.  The reader maps both files and copies nothing: opening reads the
`.idx` once to check it, and after that a process holds the pages that it touches, which all
processes of a machine share.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from litespark.data.index_file import (
    ROWS_AT_ONCE,
    TokenArray,
    bin_path,
    idx_path,
    map_file,
    open_index,
    pack_header,
    token_type,
    unreadable_shard,
)
from litespark.errors import UserError
from litespark.utils.files import HashingFile, rename_durably, temporary_name

__all__ = [
    "DocumentSpan",
    "IndexedReader",
    "IndexedWriter",
    "ShardFiles",
    "TokenArray",
    "bin_path",
    "idx_path",
    "open_index",
    "token_type",
    "unreadable_shard",
]


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
        check_documents(tokens, lengths, self.vocab_size)
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


def check_documents(tokens: TokenArray, lengths: TokenArray, vocab_size: int) -> None:
    """Refuse documents that no shard may hold: ids [sum of lengths], lengths [documents].

    Raises:
        ValueError: when the lengths do not add up or an id is outside [0, vocab_size).
    """
    if int(lengths.sum(dtype=np.int64)) != tokens.size or bool((lengths < 0).any()):
        raise ValueError(f"lengths add up to {lengths.sum()} tokens, {tokens.size} were given")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"token ids span {tokens.min()}..{tokens.max()}, outside [0, {vocab_size})"
        )


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
        documents, tokens: counts; `dtype`: the stored type; `index`: the tables.

    Raises:
        UserError: when a file is missing, is not such a file, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.index = open_index(self.prefix)
        where = str(bin_path(self.prefix))
        if self.index.tokens == 0:
            raise UserError(where, "the shard holds no tokens", "Use one with documents.")
        self.dtype = self.index.dtype
        self.tokens, self.documents = self.index.tokens, self.index.documents
        self._tokens = np.frombuffer(map_file(bin_path(self.prefix)), dtype=self.dtype)

    def read(self, document: int, start: int = 0, length: int | None = None) -> TokenArray:
        """Return a view of `length` tokens of a document from `start`, to its end when None.

        Raises:
            IndexError: when the document or the span is outside the shard.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        first, end = self.index.token_start(document), self.index.token_start(document + 1)
        available = end - first - start
        wanted = available if length is None else length
        if start < 0 or not 0 <= wanted <= available:
            raise IndexError(f"tokens {start}..{start + wanted} of document {document}")
        return self._tokens[first + start : first + start + wanted]

    def span(self, start: int = 0, stop: int | None = None) -> DocumentSpan:
        """Return the documents [start, stop) as one piece, to the shard's end when None."""
        return DocumentSpan(self, start, self.documents if stop is None else stop)

    @property
    def document_lengths_tokens(self) -> npt.NDArray[np.int64]:
        """The length of each document, int64 [documents], made anew at each use."""
        return self.span().lengths_tokens()

    def __getstate__(self) -> dict[str, str]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["prefix"])


class DocumentSpan:
    """The lengths of a run of documents of a shard, read from its index when they are asked for.

    `len` is the number of documents, `tokens` their sum.
    """

    def __init__(self, reader: IndexedReader, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= reader.documents:
            raise ValueError(f"document range {(start, stop)} of {reader.documents} documents")
        self.start, self.stop = start, stop
        self._index = reader.index
        self.tokens = self._index.token_start(stop) - self._index.token_start(start)

    def __len__(self) -> int:
        return self.stop - self.start

    def blocks(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the lengths in tokens, in order, some at a time to bound memory."""
        return self._index.document_lengths(self.start, self.stop)

    def lengths_tokens(self) -> npt.NDArray[np.int64]:
        """Return all lengths, int64 [documents]: 8 bytes a document."""
        lengths = np.empty(len(self), dtype=np.int64)
        done = 0
        for block in self.blocks():
            lengths[done : done + len(block)] = block
            done += len(block)
        return lengths
