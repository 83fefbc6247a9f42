"""What runs in a tokenizing process: a block of lines in, token ids out.

Kept apart from `preprocess` so that a spawned process imports little.  The process-wide state
below is set once by `initialize`; a process belongs to one job.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import numpy as np

from litespark.data.indexed import token_type
from litespark.data.readers import LineBlock, numbered_lines, parse_line
from litespark.data.tokenizers import Tokenizer, load_tokenizer
from litespark.utils.processes import end_with_parent


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know: `eod_id` ends each document that is not empty, unless None."""

    tokenizer: str
    json_key: str
    eod_id: int | None
    stop_at_bad_line: bool


@dataclass(frozen=True)
class TokenizedBlock:
    """The documents of a block: `tokens` as bytes of the shard's type, `lengths` as bytes of int32.

    `bad_lines` holds (line number, problem); problems travel as values, because an exception with
    arguments of its own does not survive the way back to the parent.
    """

    tokens: bytes
    lengths: bytes
    text_bytes: int
    replaced_surrogates: int
    bad_lines: tuple[tuple[int, str], ...]


_settings: Settings
_tokenizer: Tokenizer


def initialize(settings: Settings) -> None:
    """Prepare this process: one thread, deaf to Ctrl-C (the parent hears it), gone with it."""
    global _settings, _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism here
    end_with_parent()
    _settings = settings
    _tokenizer = load_tokenizer(settings.tokenizer)


def tokenize_block(block: LineBlock) -> TokenizedBlock:
    """Parse and tokenize the lines of a block, in order."""
    texts: list[str] = []
    bad_lines: list[tuple[int, str]] = []
    replaced_surrogates = 0
    for line, raw in numbered_lines(block):
        parsed = parse_line(raw, _settings.json_key)
        if isinstance(parsed, str):
            bad_lines.append((line, parsed))
            if _settings.stop_at_bad_line:
                break
        else:
            texts.append(parsed.text)
            replaced_surrogates += parsed.replaced_surrogates
    dtype = token_type(_tokenizer.vocab_size)
    end = b"" if _settings.eod_id is None else np.array([_settings.eod_id], dtype).tobytes()
    # As Megatron's tool: an empty document stays empty.
    documents = [
        ids.astype(dtype).tobytes() + end if ids.size else b""
        for ids in _tokenizer.encode_arrays(texts)
    ]
    sizes = [len(document) // np.dtype(dtype).itemsize for document in documents]
    return TokenizedBlock(
        tokens=b"".join(documents),
        lengths=np.array(sizes, dtype=np.int32).tobytes(),
        text_bytes=sum(len(text.encode("utf-8")) for text in texts),
        replaced_surrogates=replaced_surrogates,
        bad_lines=tuple(bad_lines),
    )
