"""The sample index: the two random orders of an epoch, built once and memory-mapped by everyone.

An epoch of a corpus is described by three tables of int64 (see `corpus`): the documents, or pieces
of documents, in stream order, where each ends in the stream, and the samples in the order in which
they are drawn.  They follow from the documents' lengths, the sequence length, the packing, the seed
and the epoch alone, so those are what a file is named after and what its key holds; the lengths
enter as their SHA-256, and a shard that is copied keeps its index while one that is rewritten gets
another.  A file is

    128 bytes   header of the .npy format: `numpy.load` reads the file as one array of int64
    16 x i64    magic, version, D, N, CRC-32 of the tables, SHA-256 of the key (4), 0 ..., CRC-32
                of the fifteen words before
    D x i64     documents, D x i64 their ends in tokens, N x i64 samples

Mapped, it costs a process the pages that it touches, and all processes of a machine share them.

One process builds, under a lock; others wait for the lock and then find the file.  It is written
under a temporary name, forced to the disk and renamed, so a process that is killed leaves no
half-written index.  Opening reads it once and compares its checksum, 0.1 s for ten million
documents: one wrong entry would give a run wrong samples for a whole epoch, without a word.  The
index is a convenience: where no folder can be written, the orders are built in memory and a line
says so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from litespark.data.index_file import forget_pages, map_file
from litespark.data.indexed import DocumentSpan
from litespark.data.packing import whole_documents
from litespark.utils.choice_cache import cache_path
from litespark.utils.files import atomic_write
from litespark.utils.locks import lock_file

PATIENCE_SECONDS = 600.0  # who waits longer for another process builds for itself, in memory
_POLL_SECONDS = 0.02
_MAGIC = int.from_bytes(b"LSINDEX\0", "little")
_VERSION = 1
_NPY_BYTES = 128
_WORDS = 16
_WORDS_AT_ONCE = 1 << 20  # of the tables, when they are checked
_DOCUMENTS, _SAMPLES = 0, 1  # the two random orders of an epoch
_LONGEST_NAME = 120  # of the shard's name within the file's: a file system allows 255 bytes in all
_LOGGER = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """`documents` [D] in stream order, `ends_tokens` [D] their ends in the stream, `samples` [N]
    the order in which samples are drawn; all int64.

    Of packed documents the entries are pieces, and the stream has gaps (`packing.whole_documents`).
    """

    documents: IntArray
    ends_tokens: IntArray
    samples: IntArray


@dataclass(frozen=True, eq=False)
class OrderRequest:
    """Which order is wanted: of the documents [start, stop) of a shard, whose lengths `span`
    reads, in `samples` samples of `sequence_length`, for a seed and an epoch.  `pieces` is how many
    pieces of them are to be packed; None cuts their stream.
    """

    prefix: str
    document_range: tuple[int, int]
    span: DocumentSpan
    sequence_length: int
    samples: int
    seed: int
    epoch: int
    pieces: int | None = None

    @property
    def entries(self) -> int:
        """How many documents, or pieces, the order has."""
        return len(self.span) if self.pieces is None else self.pieces

    def build(self) -> EpochOrder:
        """Compute the order in memory: at its peak some 40 bytes a document, 100 packed."""
        documents = random_order(self.seed, self.epoch, _DOCUMENTS, len(self.span))
        ends_tokens = self.span.lengths_tokens()[documents]
        if self.pieces is None:
            np.cumsum(ends_tokens, out=ends_tokens)
        else:
            documents, ends_tokens = whole_documents(documents, ends_tokens, self.sequence_length)
        samples = random_order(self.seed, self.epoch, _SAMPLES, self.samples)
        return EpochOrder(documents, ends_tokens, samples)

    def key(self) -> bytes:
        """SHA-256 of all that the order depends on."""
        digest = hashlib.sha256()
        for lengths in self.span.blocks():
            digest.update(_as_stored(lengths).data)
        digest.update(f"{_VERSION} {self.sequence_length} {self.seed} {self.epoch}".encode())
        if self.pieces is not None:
            digest.update(b" whole documents")
        return digest.digest()

    def file_name(self, key: bytes) -> str:
        """The name in the cache's folder, for people; the key's digits tell like cases apart."""
        start, stop = self.document_range
        shard = os.path.basename(self.prefix).encode()[:_LONGEST_NAME].decode(errors="ignore")
        return (
            f"{shard}_{start}-{stop}{'' if self.pieces is None else '_whole'}"
            f"_length{self.sequence_length}_seed{self.seed}"
            f"_epoch{self.epoch}_{key.hex()[:16]}.npy"
        )


@dataclass(frozen=True, eq=False)
class FoundOrder:
    """An order, how it was come by, its file (None: only in memory), and why it has none."""

    order: EpochOrder
    how: Literal["found", "built"]
    path: Path | None
    problem: str = ""


class IndexCache:
    """The folder, or folders, where the sample indices of a run's shards are kept.

    Threads may share it.

    Args:
        folder: for all shards; None for `<prefix>_index` beside each shard or, where that cannot
        be written, `litespark/index` in $XDG_CACHE_HOME or ~/.cache.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._has_complained = False

    def find(self, request: OrderRequest) -> FoundOrder:
        """Map the order's file, after building it if there is none that is whole."""
        key = request.key()
        name = request.file_name(key)
        folders = self._folders(request.prefix)
        for folder in folders:
            with suppress(_Damaged):  # told, and replaced, under the lock
                order = _map(folder / name, request, key)
                if order is not None:
                    return FoundOrder(order, "found", folder / name)
        problem = "there is no folder for it"
        for folder in folders:
            try:
                return _build_file(folder / name, request, key)
            except OSError as error:
                problem = f"{folder}: {error.strerror or error}"
        self._complain(problem)
        return FoundOrder(request.build(), "built", None, problem)

    def _folders(self, prefix: str) -> list[Path]:
        if self._folder is not None:
            return [Path(self._folder)]
        own = cache_path("index")
        return [Path(f"{prefix}_index"), *([own] if own is not None else [])]

    def _complain(self, problem: str) -> None:
        with self._lock:
            if self._has_complained:
                return
            self._has_complained = True
        _LOGGER.warning("sample index: built in memory, because it cannot be kept (%s)", problem)


class _Damaged(Exception):
    """The file is not the whole index that its name promises."""


def _build_file(path: Path, request: OrderRequest, key: bytes) -> FoundOrder:
    """Write the file under its lock and map it; or map what another process wrote meanwhile.

    Raises:
        OSError: the folder cannot be written, or another process holds the lock for too long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as is_alone:
        try:
            order = _map(path, request, key)
            if order is not None:
                return FoundOrder(order, "found", path)
        except _Damaged as damage:
            _LOGGER.warning("sample index: %s %s; it is built again", path, damage)
        if is_alone:
            # Whoever wrote these had the lock, which ends with its process.
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)
        _write(path, request.build(), key)
        try:
            order = _map(path, request, key)
        except _Damaged as damage:
            raise OSError(f"{path.name} {damage}, just after it was written") from None
    if order is None:
        raise OSError(f"{path.name} vanished just after it was written")
    return FoundOrder(order, "built", path)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of `path` for the block; the value says whether there are locks at all.

    Raises:
        TimeoutError: another process holds it for longer than `PATIENCE_SECONDS`.
        OSError: the folder cannot be written.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    with open(lock_path, "ab") as file:
        waiting = "sample index: waiting for another process that builds %s"
        outcome = lock_file(
            file, PATIENCE_SECONDS, _POLL_SECONDS, lambda: _LOGGER.info(waiting, path)
        )
        if outcome == "busy":
            raise TimeoutError(f"another process builds {path.name} and does not end")
        try:
            yield outcome == "held"  # without locks, at worst, two build the same file
        finally:
            # Who waits holds the nameless file next and finds the index written.
            with suppress(OSError):
                lock_path.unlink()


def _write(path: Path, order: EpochOrder, key: bytes) -> None:
    tables = [_as_stored(table) for table in (order.documents, order.ends_tokens, order.samples)]
    checksum = _checksum(tables)
    words = [_MAGIC, _VERSION, len(order.documents), len(order.samples), checksum]
    header = np.zeros(_WORDS, dtype="<i8")
    header[: len(words)] = words
    header[len(words) : len(words) + 4] = np.frombuffer(key, dtype="<i8")
    header[-1] = zlib.crc32(header[:-1].tobytes())
    with atomic_write(path) as file:
        file.write(_npy_header(_WORDS + sum(len(table) for table in tables)))
        file.write(header.tobytes())
        for table in tables:
            file.write(table.data)


def _map(path: Path, request: OrderRequest, key: bytes) -> EpochOrder | None:
    """Map the file; None when there is none that can be read.

    Raises:
        _Damaged: it is not whole, or another request's.
    """
    documents, samples = request.entries, request.samples
    count = _WORDS + 2 * documents + samples
    try:
        size_bytes = path.stat().st_size
        if size_bytes != _NPY_BYTES + 8 * count:
            raise _Damaged(f"has {size_bytes} bytes instead of {_NPY_BYTES + 8 * count}")
        with open(path, "rb") as file:
            has_npy_header = file.read(_NPY_BYTES) == _npy_header(count)
        mapped = map_file(path)
    except OSError:
        return None
    words = np.frombuffer(mapped, "<i8", count, _NPY_BYTES)
    header = words[:_WORDS]
    expected = [_MAGIC, _VERSION, documents, samples]
    if not (
        has_npy_header
        and header[-1] == zlib.crc32(header[:-1].tobytes())
        and header[:4].tolist() == expected
        and header[5:9].tobytes() == key
    ):
        raise _Damaged("has a header that is not its own")
    starts = (_WORDS, _WORDS + documents, _WORDS + 2 * documents)
    checksum = 0
    for first in range(_WORDS, count, _WORDS_AT_ONCE):
        checksum = zlib.crc32(words[first : first + _WORDS_AT_ONCE].data, checksum)
        forget_pages(mapped)
    if checksum != header[4]:
        raise _Damaged("does not match its checksum")
    return EpochOrder(*(words[a:b] for a, b in zip(starts, (*starts[1:], count), strict=True)))


def _npy_header(count: int) -> bytes:
    """The .npy header of `count` int64 in one array, the same in every release of NumPy."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({count},), }}"
    text_bytes = _NPY_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", text_bytes) + f"{text:<117}\n".encode("ascii")


def _checksum(tables: list[IntArray]) -> int:
    checksum = 0
    for table in tables:
        checksum = zlib.crc32(table.data, checksum)
    return checksum


def _as_stored(table: IntArray) -> IntArray:
    return np.ascontiguousarray(table, dtype="<i8")


def random_order(seed: int, epoch: int, purpose: int, count: int) -> IntArray:
    """Return a permutation of range(count), int64, that depends on the arguments alone.

    `purpose` tells apart the orders of one epoch.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, purpose])).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)
