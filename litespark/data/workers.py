"""What runs in a tokenizing process: a block of lines in, token ids out.

Kept apart from `preprocess` so that a spawned process imports little.  Each task brings the job's
`Settings`, so that processes can start before these are known; a process keeps the engine that it
has loaded for the last ones.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from litespark.data.documents import parsed_lines
from litespark.data.engine import Engine, FastEngine, FastModel, ReferenceEngine, encode_texts
from litespark.data.indexed import token_type
from litespark.data.reading import Block, SharedBlock, SharedBytes


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Attributes:
        tokenizer: path of the reference, loaded only when `model_path` is None.
        model_path: file of what the fast engine loads.
        vocab_size: decides the stored type.
        json_keys, split_by: see `litespark.data.documents.parse_line`.
        bos_id, eod_id: begin and end each document that is not empty, unless None.
        stop_at_bad_line: tokenize nothing of a block after its first bad line.
    """

    tokenizer: str
    model_path: str | None
    vocab_size: int
    json_keys: tuple[str, ...]
    split_by: str | None
    bos_id: int | None
    eod_id: int | None
    stop_at_bad_line: bool


@dataclass(frozen=True)
class TokenizedGroup:
    """Documents of a block that go to one shard, in order.

    `tokens` holds ids as bytes of the shard's type, here or in shared memory, `lengths` as bytes of
    int32.
    """

    key: str
    subset: str
    tokens: bytes | SharedBytes
    lengths: bytes
    text_bytes: int
    replaced_surrogates: int


@dataclass(frozen=True)
class TokenizedBlock:
    """What became of a block.

    `bad_lines` holds (line number, problem); problems travel as values, because an exception with
    arguments of its own does not survive the way back to the parent.
    """

    groups: tuple[TokenizedGroup, ...]
    bad_lines: tuple[tuple[int, str], ...]


@dataclass
class _Group:
    documents: list[npt.NDArray[np.integer]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    text_bytes: int = 0
    replaced_surrogates: int = 0


def warm_up() -> None:
    """Import what the tasks need; the first task of a process makes it start."""
    with suppress(ImportError):  # told when the engine is tried
        import gigatoken  # noqa: F401


@functools.lru_cache(maxsize=1)
def _engine(settings: Settings) -> Engine:
    if settings.model_path is not None:
        return FastEngine(*FastModel.load(settings.model_path))
    from litespark.data.tokenizers import load_tokenizer

    return ReferenceEngine(load_tokenizer(settings.tokenizer))


def try_engine(settings: Settings, texts: list[str]) -> list[list[int]] | str:
    """Return the ids of texts, or why the engine cannot be loaded."""
    return encode_texts(lambda: _engine(settings), texts)


def tokenize_block(settings: Settings, block: Block) -> TokenizedBlock:
    """Parse and tokenize the lines of a block, in order."""
    lines = block.load() if isinstance(block, SharedBlock) else block
    engine, dtype = _engine(settings), token_type(settings.vocab_size)
    begin = np.array([] if settings.bos_id is None else [settings.bos_id], dtype)
    end = np.array([] if settings.eod_id is None else [settings.eod_id], dtype)
    groups: dict[tuple[str, str], _Group] = {}
    bad_lines: list[tuple[int, str]] = []
    for line, parsed in parsed_lines(lines, settings.json_keys, settings.split_by):
        if isinstance(parsed, str):
            bad_lines.append((line, parsed))
            if settings.stop_at_bad_line:
                break
            continue
        for key, text, replaced in zip(
            settings.json_keys, parsed.texts, parsed.replaced_surrogates, strict=True
        ):
            group = groups.setdefault((key, parsed.subset), _Group())
            group.replaced_surrogates += replaced
            encoded = text.encode("utf-8")
            group.text_bytes += len(encoded)
            ids = engine.encode(encoded) if encoded else end[:0]
            # As Megatron's tool: an empty document stays empty.
            document = (begin, ids, end) if ids.size else ()
            group.documents += document
            group.lengths.append(sum(map(len, document)))
    engine.trim()
    ids = [_joined(group, dtype) for group in groups.values()]
    stored = block.put_beside(ids) if isinstance(block, SharedBlock) else ids
    return TokenizedBlock(
        tuple(
            TokenizedGroup(
                key=key,
                subset=subset,
                tokens=tokens,
                lengths=np.array(group.lengths, dtype=np.int32).tobytes(),
                text_bytes=group.text_bytes,
                replaced_surrogates=group.replaced_surrogates,
            )
            for ((key, subset), group), tokens in zip(groups.items(), stored, strict=True)
        ),
        tuple(bad_lines),
    )


def _joined(group: _Group, dtype: type[np.integer]) -> bytes:
    documents = group.documents or [np.empty(0, dtype)]
    # The ids are below the vocabulary's size; the parent checks it again on what it gets.
    return np.concatenate(documents, dtype=dtype, casting="unsafe").tobytes()
