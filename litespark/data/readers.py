"""From files to documents: `.jsonl`, `.jsonl.zst` and `.jsonl.gz`, one JSON object a line.

Reading has two halves.  `iterate_blocks` decompresses and cuts at line ends, about 1 GB/s, in the
one process that knows the order.  `parse_line` turns a line into text and can run in any process,
so the preprocessor ships whole blocks to its workers and never pays for JSON in the process that
feeds them.

Nothing is skipped in silence: a line that gives no text is a `BadLine` with its file and line
number, and a compressed file that ends early is an error that names it.  Lines of white space
only are no lines.
"""

from __future__ import annotations

import glob
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from litespark.errors import UserError

FOLDER_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
# Named outright, `.json` is taken as JSON lines too (Megatron-LM's examples call them so); a
# folder may hold a config.json, so there it is passed over.
FILE_SUFFIXES = (*FOLDER_SUFFIXES, ".json", ".json.zst", ".json.gz")

BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 28  # no document comes near; a bound keeps a decompression bomb out of memory
# 4 bytes of zstd can stand for 128 KiB; small bites keep the output of one call bounded.
_ZSTD_BITE_BYTES = 1 << 13
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_PROBLEM_CHARACTERS = 200


@dataclass(frozen=True)
class Source:
    """One input file: `path` to open, and `name`, the path below the input that named it."""

    path: str
    name: str


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file: `first_line` is the number (from 1) of the first line in `data`."""

    source: Source
    first_line: int
    data: bytes


@dataclass(frozen=True)
class BadLine:
    """A line that gives no document, and why, as a clause."""

    path: str
    line: int
    problem: str

    def as_error(self) -> UserError:
        """Return the error that stops the reading at this line."""
        return UserError(
            f"{self.path}:{self.line}",
            self.problem,
            "Repair the line, or skip such lines with --on-error skip.",
        )


@dataclass(frozen=True)
class ParsedLine:
    """The text of a line and how many lone surrogates in it became U+FFFD."""

    text: str
    replaced_surrogates: int


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Resolve files, folders (searched recursively, sorted) and globs to input files, in order.

    Raises:
        UserError: when an input is missing, matches nothing, holds no JSON lines, has another
            suffix, is no regular file, or when one file is named twice, by whatever path.
    """
    sources: list[Source] = []
    for given in inputs:
        sources.extend(_sources_of(given))
    seen: dict[str, str] = {}
    for source in sources:
        real_path = os.path.realpath(source.path)
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


def _sources_of(given: str) -> list[Source]:
    if not given:
        raise UserError(
            "--input ''", "is empty", "Name a file, a folder or a glob; is a variable unset?"
        )
    # os.path here and below: pathlib raises where a name is too long or a folder may not be read.
    if os.path.lexists(given):
        found = _sources_at(Path(given))
        if not found:
            raise UserError(
                f"--input {given}",
                "the folder holds no .jsonl, .jsonl.zst or .jsonl.gz file",
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
            "Name an existing .jsonl, .jsonl.zst or .jsonl.gz file, a folder of them, or a glob.",
        )
    return list(once.values())


def _sources_at(path: Path) -> list[Source]:
    """Return the one file at `path`, or the files below it, which may be none."""
    if not os.path.isdir(path):
        return [_named_file(path)]
    parent = path.resolve().name
    found = sorted(
        p for p in path.rglob("*") if p.name.endswith(FOLDER_SUFFIXES) and not os.path.isdir(p)
    )
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
            "the suffix is none of .jsonl, .json, .jsonl.zst, .jsonl.gz",
            "Convert the file to JSON lines (one object a line), optionally compressed.",
        )
    return Source(str(path), path.name)


def iterate_blocks(source: Source, block_bytes: int = BLOCK_BYTES) -> Iterator[LineBlock]:
    """Yield a file's decompressed bytes as blocks of whole lines of about `block_bytes`.

    Raises:
        UserError: when the file cannot be read, is corrupt or truncated, or a line exceeds 256
        MiB.
    """
    first_line = 1
    pending: list[bytes] = []  # pieces of the block being gathered; its last line may be unfinished
    pending_bytes = 0
    for piece in _decompressed(source.path):
        pending.append(piece)
        pending_bytes += len(piece)
        if pending_bytes < block_bytes:
            continue
        if b"\n" in piece:
            data, tail = _cut_after_last_line(b"".join(pending))
            yield LineBlock(source, first_line, data)
            first_line += data.count(b"\n")
            pending, pending_bytes = [tail], len(tail)
        if pending_bytes > MAX_LINE_BYTES:
            raise UserError(
                f"{source.path}:{first_line + sum(p.count(10) for p in pending)}",
                f"the line is longer than {MAX_LINE_BYTES >> 20} MiB",
                "A document this long is a broken file; look at its line ends.",
            )
    if pending_bytes:
        yield LineBlock(source, first_line, b"".join(pending))


def _cut_after_last_line(data: bytes) -> tuple[bytes, bytes]:
    cut = data.rfind(b"\n") + 1
    return data[:cut], data[cut:]


def _decompressed(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            pieces = _open_pieces(path, file)
            first = next(pieces, b"")
            yield first.removeprefix(_BYTE_ORDER_MARK)
            yield from pieces
    except OSError as error:  # gzip.BadGzipFile is one too
        raise _unreadable(path, error.strerror or str(error)) from error
    except (EOFError, zlib.error) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: str, reason: str) -> UserError:
    return UserError(path, f"cannot be read to its end: {reason}", "Fetch or write the file again.")


def _open_pieces(path: str, file: BinaryIO) -> Iterator[bytes]:
    if path.endswith(".zst"):
        return _zstd_pieces(path, file)
    if path.endswith(".gz"):
        import gzip

        stream = gzip.GzipFile(fileobj=file, mode="rb")
        return iter(lambda: stream.read(BLOCK_BYTES), b"")
    return iter(lambda: file.read(BLOCK_BYTES), b"")


def _zstd_pieces(path: str, file: BinaryIO) -> Iterator[bytes]:
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


def parse_line(raw: bytes, json_key: str) -> ParsedLine | str:
    """Return the text under `json_key` of one JSON line, or the problem with the line as a clause.

    Lone surrogates (`\\ud809` without its other half), which no UTF-8 text can hold, become
    U+FFFD.
    """
    import orjson

    may_hold_surrogates = False
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # orjson refuses lone surrogates, the json module lets them through.
        if b"\\ud" not in raw and b"\\uD" not in raw:
            return _not_json(error)
        try:
            value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as second_error:
            return _not_json(second_error)
        may_hold_surrogates = True
    if not isinstance(value, dict):
        return f"the line is {_kind(value)}, not an object like {{{json_key!r}: ...}}"
    if json_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:8]) or "none"
        return f"the object has no key {json_key!r} (its keys: {keys})"[:_MAX_PROBLEM_CHARACTERS]
    text = value[json_key]
    if not isinstance(text, str):
        return f"the value of {json_key!r} is {_kind(text)}, not a string"
    if may_hold_surrogates:
        return ParsedLine(*_SURROGATE.subn("\ufffd", text))
    return ParsedLine(text, 0)


def _not_json(error: Exception) -> str:
    return f"the line is not valid JSON ({error})"[:_MAX_PROBLEM_CHARACTERS]


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "a string"}
    return kinds.get(type(value), "an object")


def numbered_lines(block: LineBlock) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, bytes) of a block's lines, passing over those of white space only."""
    for offset, raw in enumerate(block.data.split(b"\n")):
        if raw and not raw.isspace():
            yield block.first_line + offset, raw
