"""The manifest beside a shard: what it was made of, and the checksums that the format lacks.

`P_text_document.json` is written by `preprocess`.  A shard of Megatron-LM has none and is read
all the same; with one, a tokenizer that does not match and a flipped bit can be told.
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from litespark.data.indexed import ShardFiles
from litespark.errors import UserError
from litespark.utils.files import write_text_atomically

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)  # 1 lacks what has a default below
_MAX_MANIFEST_BYTES = 1 << 28


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the ids: SHA-256 of its model file, that file's name, and its sizes."""

    identity: str
    name: str
    vocab_size: int
    eos_id: int | None


@dataclass(frozen=True)
class SourceRecord:
    """One input file: its name below the input that named it, its size, its documents.

    `sha256` is of the file as it is (compressed); None in manifests of format 1.
    """

    name: str
    size_bytes: int
    documents: int
    sha256: str | None = None


@dataclass(frozen=True)
class ChatRecord:
    """What a shard of conversations (sft) or preference pairs (dpo) was made of.

    `template_sha256` is of the chat template; of `rows` in the input `kept` are here, `truncated`
    of them cut at `max_tokens`, and `left_out` counts the others by reason.  `longest_tokens` is
    the longest conversation or pair, `answer_tokens` how many tokens are trained on, `answers` the
    files of the shard that says which.
    """

    task: str
    template_sha256: str
    turns: str
    max_tokens: int | None
    rows: int
    kept: int
    truncated: int
    left_out: dict[str, int]
    longest_tokens: int
    answer_tokens: int
    answers: ShardFiles


@dataclass(frozen=True)
class Manifest:
    """Everything known about a shard; `files` holds sizes, digests and counts.

    `skipped_bad_lines` counts those of the whole job, which may have written several shards.
    `split_by` and `subset` name the sub-source whose documents these are, where it was split;
    `chats` is of shards for post-training.
    """

    tokenizer: TokenizerRecord
    append_eod: bool
    json_key: str
    sources: tuple[SourceRecord, ...]
    files: ShardFiles
    skipped_bad_lines: int
    replaced_surrogates: int
    litespark_version: str
    prepend_bos: bool = False
    split_by: str | None = None
    subset: str | None = None
    chats: ChatRecord | None = None
    format_version: int = FORMAT_VERSION


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Return `<prefix>.json`."""
    return Path(f"{os.fspath(prefix)}.json")


def write_manifest(prefix: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write the manifest of the shard `prefix`, whole or not at all.

    Raises:
        OSError: when the disk is full.
    """
    write_text_atomically(manifest_path(prefix), manifest_text(manifest))


def manifest_text(manifest: Manifest) -> str:
    """Return the file's content."""
    return json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"


def read_manifest(prefix: str | os.PathLike[str]) -> Manifest | None:
    """Return the manifest of the shard `prefix`, or None when there is none.

    Raises:
        UserError: when the file is there but is no manifest of a known version.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError("the file is too large")
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise TypeError("it is not an object")
        version = value.get("format_version")
        if version not in _READABLE_VERSIONS:
            raise ValueError(f"format_version is {version!r}, known are {_READABLE_VERSIONS}")
        value["tokenizer"] = _record(TokenizerRecord, value.get("tokenizer"))
        value["files"] = _record(ShardFiles, value.get("files"))
        sources = value.get("sources")
        if not isinstance(sources, list):
            raise TypeError("'sources' is not a list")
        value["sources"] = tuple(_record(SourceRecord, source) for source in sources)
        if value.get("chats") is not None:
            value["chats"] = _chat_record(value["chats"])
        return _record(Manifest, value)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            str(path),
            f"is not a manifest of a shard ({error})",
            "Remove it to read the shard without one, or write the shard again.",
        ) from error


# The types as written in the dataclasses above (annotations are strings there), for JSON values.
_CHECKS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
}


@cache
def _fields_of(kind: type[Any]) -> tuple[dict[str, str], frozenset[str]]:
    """The type of each field as it is written, and the fields without a default.

    Kept, because a manifest may have a hundred thousand sources.
    """
    known = {field.name: str(field.type) for field in fields(kind)}
    return known, frozenset(field.name for field in fields(kind) if field.default is MISSING)


def _chat_record(value: object) -> ChatRecord:
    if not isinstance(value, dict) or not isinstance(value.get("left_out"), dict):
        raise TypeError("'chats' is not what was written")
    counts = value["left_out"].values()
    if any(not isinstance(count, int) or isinstance(count, bool) for count in counts):
        raise TypeError("'left_out' does not hold counts")
    return _record(ChatRecord, {**value, "answers": _record(ShardFiles, value.get("answers"))})


def _record(kind: type[Any], value: object) -> Any:
    """Build the dataclass `kind` from a JSON object with exactly its fields, of their types."""
    if not isinstance(value, dict):
        raise TypeError(f"no object where a {kind.__name__} belongs")
    known, required = _fields_of(kind)
    wrong = (value.keys() - known.keys()) | (required - value.keys())
    if wrong:
        raise ValueError(f"unknown or missing in {kind.__name__}: {', '.join(sorted(wrong))}")
    for name, annotation in known.items():
        if name not in value:
            continue
        allowed = _CHECKS.get(annotation)
        item = value[name]
        is_bool_for_int = isinstance(item, bool) and annotation != "bool"
        if allowed and (not isinstance(item, allowed) or is_bool_for_int):
            raise TypeError(f"{name} is not of type {annotation}")
    return kind(**value)
