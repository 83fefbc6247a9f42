"""From a line to its texts: what a line must look like, and what is wrong with one that does not.

Runs in the worker processes, for JSON costs more than reading does.  A problem is returned as a
clause and never decides anything: the policy for bad lines belongs to the preprocessor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from litespark.data.readers import LineBlock
from litespark.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_PROBLEM_CHARACTERS = 200
_MAX_SUBSET_CHARACTERS = 100


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
    """The texts of a line, one a key, and how many lone surrogates in each became U+FFFD.

    `subset` names the sub-source the line belongs to; it is empty where nothing is split.
    """

    texts: tuple[str, ...]
    replaced_surrogates: tuple[int, ...]
    subset: str = ""


def parse_line(
    raw: bytes, json_keys: Sequence[str], split_by: str | None = None
) -> ParsedLine | str:
    """Return the texts under `json_keys` of one JSON line, or the problem with it as a clause.

    Lone surrogates (`\\ud809` without its other half), which no UTF-8 text can hold, become
    U+FFFD.

    Args:
        raw: the line.
        json_keys: the keys of the texts; a line that lacks one gives none.
        split_by: dotted path of the sub-source's name, like `meta.redpajama_set_name`.
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
        return f"the line is {kind_of(value)}, not an object like {{{json_keys[0]!r}: ...}}"
    for key in json_keys:
        if not isinstance(value.get(key), str):
            return _no_text(value, key)
    subset = "" if split_by is None else _subset(value, split_by)
    if subset is None:
        return f"there is no name for a file at {split_by!r}, by which the data is to be split"
    texts = tuple(value[key] for key in json_keys)
    if may_hold_surrogates:
        pairs = [_SURROGATE.subn("\ufffd", text) for text in texts]
        return ParsedLine(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), subset)
    return ParsedLine(texts, (0,) * len(texts), subset)


def _no_text(value: dict[str, Any], key: str) -> str:
    if key in value:
        return f"the value of {key!r} is {kind_of(value[key])}, not a string"
    keys = ", ".join(repr(key) for key in list(value)[:8]) or "none"
    return f"the object has no key {key!r} (its keys: {keys})"[:_MAX_PROBLEM_CHARACTERS]


def _subset(value: Any, split_by: str) -> str | None:
    """Return the string at a dotted path, None where none can be part of a file's name.

    Some copies of SlimPajama hold `meta` as a string of JSON; it is looked into.
    """
    for name in split_by.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_SUBSET_CHARACTERS:
        return None
    safe = all(char.isalnum() or char in "-_.+ " for char in value)
    return value if safe and not value.startswith(".") and not _SURROGATE.search(value) else None


def parse_text(raw: bytes) -> ParsedLine | str:
    """Return a plain text file's content as one document, or the problem with it as a clause."""
    try:
        return ParsedLine((raw.decode("utf-8"),), (0,))
    except UnicodeDecodeError as error:
        return f"the text is not UTF-8 ({error.reason} at byte {error.start})"


def _not_json(error: Exception) -> str:
    return f"the line is not valid JSON ({error})"[:_MAX_PROBLEM_CHARACTERS]


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "a string"}
    return kinds.get(type(value), "an object")


def parsed_lines(
    block: LineBlock, json_keys: Sequence[str], split_by: str | None = None
) -> Iterator[tuple[int, ParsedLine | str]]:
    """Yield (line number, texts or problem) of a block; a plain text file is line 1.

    Args:
        block: of whole lines, or all of a plain text file.
        json_keys, split_by: see `parse_line`.
    """
    if block.source.is_text:
        yield 1, parse_text(block.data)
        return
    for line, raw in numbered_lines(block):
        yield line, parse_line(raw, json_keys, split_by)


def numbered_lines(block: LineBlock) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, bytes) of a block's lines, passing over those of white space only."""
    for offset, raw in enumerate(block.data.split(b"\n")):
        if raw and not raw.isspace():
            yield block.first_line + offset, raw
