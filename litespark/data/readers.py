"""From files to blocks of lines: JSON lines, parquet and plain text, compressed or not.

Reading has two halves.  `iterate_blocks` decompresses and cuts at line ends, 0.3 to 1 GB/s, in one
process, for there is one order (`litespark.data.reading` says which process that is).
`litespark.data.documents` turns a line into text and can run in any process, so the preprocessor
ships whole blocks to its workers and never pays for JSON in the process that feeds them.  A row of
a parquet file becomes a line; a plain text file is one document.

Nothing is skipped in silence: a compressed file that ends early is an error that names it.  Lines
of white space only are no lines.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from litespark.data import storage
from litespark.errors import UserError

FOLDER_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.zst", ".txt.gz")
# Named outright, `.json` is taken as JSON lines too (Megatron-LM's examples call them so); a
# folder may hold a config.json, so there it is passed over.
FILE_SUFFIXES = (*FOLDER_SUFFIXES, *TEXT_SUFFIXES, ".json", ".json.zst", ".json.gz")

_NAMED_SUFFIXES = ".jsonl, .jsonl.zst, .jsonl.gz, .parquet"
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 28  # no document comes near; a bound keeps a decompression bomb out of memory
# 4 bytes of zstd can stand for 128 KiB; small bites keep the output of one call bounded.
_ZSTD_BITE_BYTES = 1 << 13
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One input file: `path` to open, and `name`, the path below the input that named it.

    `version` is known of what a store has listed: to ask for it again would be a request a file.
    """

    path: str
    name: str
    version: storage.FileVersion | None = None

    @property
    def is_text(self) -> bool:
        """Whether the file is plain text, one document."""
        return self.path.endswith(TEXT_SUFFIXES)


class Meter:
    """What has been read of the files themselves: bytes of all, and SHA-256 of the latest one."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self._digest = hashlib.sha256()

    def start_file(self) -> None:
        """Begin the digest anew."""
        self._digest = hashlib.sha256()

    def update(self, data: bytes) -> None:
        """Count bytes."""
        self.read_bytes += len(data)
        self._digest.update(data)

    def sha256(self) -> str:
        """Return the digest of the file read last, 64 hexadecimal digits."""
        return self._digest.hexdigest()


class _MeteredFile:
    """A file whose bytes a `Meter` sees as they are read."""

    def __init__(self, file: BinaryIO, meter: Meter) -> None:
        self._file = file
        self._meter = meter

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._meter.update(data)
        return data


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file: `first_line` is the number (from 1) of the first line in `data`.

    Of a plain text file `data` is all of it.
    """

    source: Source
    first_line: int
    data: bytes


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Resolve files, folders (searched recursively, sorted) and globs to input files, in order.

    Raises:
        UserError: when an input is missing, matches nothing, holds no JSON lines, has another
            suffix, is no regular file, has a name that is not UTF-8, or when one file is named
            twice, by whatever path.
    """
    sources: list[Source] = []
    for given in inputs:
        sources.extend(_sources_of(given))
    seen: dict[str, str] = {}
    for source in sources:
        _require_utf8_name(source)
        is_local = not storage.is_remote(source.path)
        real_path = os.path.realpath(source.path) if is_local else source.path
        if real_path in seen:
            earlier = seen[real_path]
            other = "" if earlier == source.path else f" (first as {earlier})"
            raise UserError(
                f"--input {source.path}",
                f"the file is named twice{other}, and its documents would be counted twice",
                "Name each file once; to see a corpus more often, raise its weight in the blend.",
            )
        seen[real_path] = source.path
    return sources


def _require_utf8_name(source: Source) -> None:
    """Refuse at the start a name that the manifest, which is UTF-8, could not hold at the end."""
    try:
        source.name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"--input {os.fsencode(source.path)!r}",
            "the name is not UTF-8, so the manifest cannot hold it",
            "Rename the file.",
        ) from error


def _sources_of(given: str) -> list[Source]:
    if not given:
        raise UserError(
            "--input ''", "is empty", "Name a file, a folder or a glob; is a variable unset?"
        )
    if storage.is_remote(given):
        return _remote_sources(given)
    # os.path here and below: pathlib raises where a name is too long or a folder may not be read.
    if os.path.lexists(given):
        found = _sources_at(Path(given))
        if not found:
            raise UserError(
                f"--input {given}",
                f"the folder holds no {_NAMED_SUFFIXES} or .txt file",
                "Name the folder that holds the data.",
            )
        return found
    # '**' matches a folder and what is in it, so the same file can come from both: once is meant.
    # Links to it are other names and stay, for `find_sources` to refuse.
    once: dict[str, Source] = {}
    for match in sorted(glob.glob(given, recursive=True)):
        for source in _sources_at(Path(match)):
            once.setdefault(os.path.abspath(source.path), source)
    if not once:
        raise UserError(
            f"--input {given}",
            "no such file or folder, and as a glob it matches nothing",
            f"Name an existing {_NAMED_SUFFIXES} or .txt file, a folder of them, or a glob.",
        )
    return list(once.values())


def _remote_sources(given: str) -> list[Source]:
    """Return the objects in a store that `given` names: one, a folder of them, or a glob."""
    try:
        files = storage.list_files(given)
    except OSError as error:
        raise UserError(
            f"--input {given}",
            f"cannot be listed: {error.strerror or error}",
            "Check the name, the credentials and AWS_ENDPOINT_URL.",
        ) from error
    found = [file for file in files if file.path.endswith(FOLDER_SUFFIXES)] or [
        file for file in files if file.path.endswith(FILE_SUFFIXES)
    ]
    if not found:
        raise UserError(
            f"--input {given}",
            f"there is no {_NAMED_SUFFIXES} or .txt object of that name or below it",
            "Give s3://BUCKET/NAME of an object, a folder of them, or a glob.",
        )
    for file in found:
        if file.path.endswith(".parquet"):
            raise UserError(
                f"--input {file.path}",
                "is a parquet file in a store, which is read out of order",
                "Copy it to this machine first.",
            )
    # Named from the last part of what was given, as for a local folder.
    parent = given.rstrip("/").rpartition("/")[0] + "/"
    return [Source(file.path, file.path.removeprefix(parent), file.version) for file in found]


def _sources_at(path: Path) -> list[Source]:
    """Return the one file at `path`, or the files below it, which may be none."""
    if not os.path.isdir(path):
        return [_named_file(path)]
    parent = path.resolve().name
    files = sorted(p for p in path.rglob("*") if not os.path.isdir(p))
    # Beside data, a .txt file is a licence or a readme; alone, it is the data.
    found = [p for p in files if p.name.endswith(FOLDER_SUFFIXES)] or [
        p for p in files if p.name.endswith(TEXT_SUFFIXES)
    ]
    for file in found:
        _require_regular_file(file)
    return [Source(str(p), (parent / p.relative_to(path)).as_posix()) for p in found]


def _require_regular_file(path: Path) -> None:
    if not os.path.isfile(path):
        raise UserError(
            f"--input {path}",
            "is no regular file (a broken link, a pipe or a device)",
            "Repair or remove the link; write what a pipe gives to a .jsonl file first.",
        )


def _named_file(path: Path) -> Source:
    _require_regular_file(path)
    if not path.name.endswith(FILE_SUFFIXES):
        raise UserError(
            f"--input {path}",
            "the suffix is none of .jsonl, .json, .txt (each also with .zst or .gz), .parquet",
            "Convert the file to JSON lines (one object a line), optionally compressed.",
        )
    return Source(str(path), path.name)


def open_source(path: str) -> BinaryIO:
    """Open an input file for reading bytes; every reading of an input begins here.

    Raises:
        OSError: when the file cannot be opened.
    """
    return storage.open_for_reading(path)


def iterate_blocks(
    source: Source,
    block_bytes: int = BLOCK_BYTES,
    meter: Meter | None = None,
    columns: Sequence[str] = (),
) -> Iterator[LineBlock]:
    """Yield a file's content as blocks of whole lines of about `block_bytes`, always the same ones.

    Args:
        source: the file.
        block_bytes: how much to gather before a block is cut off.
        meter: counts and digests the bytes read of the file itself.
        columns: of a parquet file, the columns to read; without any, all.

    Raises:
        UserError: when the file cannot be read, is corrupt or truncated, or a line exceeds 256
        MiB.
    """
    for first_line, pieces in iterate_pieces(source, block_bytes, meter or Meter(), columns):
        yield LineBlock(source, first_line, b"".join(pieces))


def iterate_pieces(
    source: Source, block_bytes: int, meter: Meter, columns: Sequence[str]
) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (number of its first line, data in pieces) of each block that `iterate_blocks` gives.

    Raises:
        UserError: see `iterate_blocks`.
    """
    meter.start_file()
    if source.path.endswith(".parquet"):
        from litespark.data.parquet import parquet_lines

        pieces = parquet_lines(source.path, columns, _digest_first(source.path, meter))
    else:
        pieces = _decompressed(source.path, meter, block_bytes)
    return _cut(source, pieces, sys.maxsize if source.is_text else block_bytes)


def _digest_first(path: str, meter: Meter) -> BinaryIO:
    """Return a parquet file open at its start; it is read out of order, so it is digested first."""
    try:
        file = open_source(path)
        while data := file.read(BLOCK_BYTES):
            meter.update(data)
        file.seek(0)
        return file
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _cut(
    source: Source, pieces: Iterator[bytes], block_bytes: int
) -> Iterator[tuple[int, list[bytes]]]:
    first_line = 1
    pending: list[bytes] = []  # pieces of the block being gathered; its last line may be unfinished
    pending_bytes = 0
    for piece in pieces:
        pending.append(piece)
        pending_bytes += len(piece)
        if pending_bytes >= block_bytes and b"\n" in piece:
            cut = piece.rfind(b"\n") + 1
            pending[-1], tail = piece[:cut], piece[cut:]
            yield first_line, pending
            first_line += sum(p.count(b"\n") for p in pending)
            pending, pending_bytes = [tail], len(tail)
        if pending_bytes > MAX_LINE_BYTES:
            line = first_line + sum(p.count(b"\n") for p in pending)
            raise UserError(
                source.path if source.is_text else f"{source.path}:{line}",
                f"the {'text' if source.is_text else 'line'} is longer than "
                f"{MAX_LINE_BYTES >> 20} MiB",
                "A document this long is a broken file; look at its line ends.",
            )
    if pending_bytes or source.is_text:  # an empty text is a document all the same
        yield first_line, pending


def _decompressed(path: str, meter: Meter, piece_bytes: int) -> Iterator[bytes]:
    try:
        with open_source(path) as file:
            pieces = _open_pieces(path, _MeteredFile(file, meter), piece_bytes)
            first = next(pieces, b"")
            yield first.removeprefix(_BYTE_ORDER_MARK)
            yield from pieces
    except OSError as error:  # gzip.BadGzipFile is one too
        raise _unreadable(path, error.strerror or str(error)) from error
    except (EOFError, zlib.error) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: str, reason: str) -> UserError:
    return UserError(path, f"cannot be read to its end: {reason}", "Fetch or write the file again.")


def _open_pieces(path: str, file: _MeteredFile, piece_bytes: int) -> Iterator[bytes]:
    if path.endswith(".zst"):
        return _zstd_pieces(path, file)
    if path.endswith(".gz"):
        import gzip

        stream = gzip.GzipFile(fileobj=cast(BinaryIO, file), mode="rb")
        return iter(lambda: stream.read(piece_bytes), b"")
    return iter(lambda: file.read(piece_bytes), b"")


def _zstd_pieces(path: str, file: _MeteredFile) -> Iterator[bytes]:
    # python-zstandard's stream_reader takes a file that ends inside a frame for a complete one,
    # so the frames are walked here and the end of each is asked for.
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    inside_frame = False
    try:
        while bite := file.read(_ZSTD_BITE_BYTES):
            while bite:
                yield frame.decompress(bite)
                inside_frame = not frame.eof
                bite = b""
                if frame.eof:
                    bite = frame.unused_data
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise _unreadable(path, str(error)) from error
    if inside_frame:
        raise _unreadable(path, "the file ends inside a zstd frame; it is truncated")
