"""Tiny tokenizers and corpora, made from the English text that CPython itself ships."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from litespark.data import job, readers
from litespark.data.indexed import IndexedWriter

# `pydoc_data.topics` holds long help texts; a paragraph makes a document of realistic size.
PARAGRAPHS = [
    paragraph
    for _, text in sorted(pydoc_data.topics.topics.items())
    for paragraph in text.split("\n\n")
    if paragraph.strip()
]


def train_json_tokenizer(folder: Path, vocab_size: int = 600, eos: str | None = "</s>") -> Path:
    """Train a byte-level BPE and return its folder; `eos` None makes one without control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[] if eos is None else ["<s>", eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PARAGRAPHS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def train_sentencepiece(folder: Path, vocab_size: int = 700, **options: object) -> Path:
    """Train a Llama-like sentencepiece BPE and return its folder."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(line for text in PARAGRAPHS for line in text.split("\n") if line),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        **(settings | options),
    )
    return folder


def make_blocks_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few documents, so that a small input keeps several processes busy."""
    monkeypatch.setattr(readers.iterate_blocks, "__defaults__", (2000, None, ()))
    monkeypatch.setattr(job, "BLOCK_BYTES", 2000)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write one `{"text": ...}` a line, ASCII-escaped as SlimPajama is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_shard(prefix: Path, lengths: list[int], vocab_size: int = 60000) -> np.ndarray:
    """Write a shard whose tokens count up from 0 (so each names its place); return the tokens."""
    tokens = np.arange(sum(lengths)) % vocab_size
    with IndexedWriter(prefix, vocab_size) as writer:
        writer.add_documents(tokens, lengths)
    return tokens
