"""Tiny chats: a tokenizer with control tokens, templates, and rows of conversations and pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.data import PARAGRAPHS

CONTROL_TOKENS = ["<|im_start|>", "<|im_end|>", "</s>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same text, with marks around what the assistant generates.
CHATML_MARKED = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Drops the thinking of all answers but the last, as Qwen 3's template does.
FORGETFUL = (
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_chat_tokenizer(folder: Path, template: str = CHATML, vocab_size: int = 600) -> Path:
    """Train a byte-level BPE with ChatML's control tokens, as a Hugging Face folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PARAGRAPHS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def text_of(generator: random.Random, least: int = 5, most: int = 60) -> str:
    """Some characters of a paragraph."""
    paragraph = generator.choice(PARAGRAPHS)
    start = generator.randrange(max(1, len(paragraph) - most))
    text = paragraph[start : start + generator.randint(least, most)].strip()
    return text or "well"


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in OpenAI's layout, of one to three turns."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        if generator.random() < 0.3:
            messages.append({"role": "system", "content": text_of(generator)})
        for _ in range(generator.randint(1, 3)):
            messages.append({"role": "user", "content": text_of(generator)})
            messages.append({"role": "assistant", "content": text_of(generator)})
        rows.append({"messages": messages})
    return rows


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of preferences, prompts and answers as texts."""
    generator = random.Random(seed)
    return [
        {
            "prompt": text_of(generator),
            "chosen": text_of(generator, 5, 40) + "!",
            "rejected": text_of(generator, 5, 40) + "?",
        }
        for _ in range(count)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line; a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_chat_shard(
    folder: Path, task: Any, rows: list[Any], template: str = CHATML, **options: Any
) -> str:
    """Preprocess rows with a tokenizer made on the way; the shard's prefix."""
    from litespark.data.chat_job import ChatOptions, preprocess_chats

    tokenizer = train_chat_tokenizer(folder / "tokenizer", template)
    source = write_rows(folder / f"{task}.jsonl", rows)
    chat_options = ChatOptions(
        task=task,
        inputs=(str(source),),
        tokenizer=str(tokenizer),
        output_prefix=str(folder / "chats"),
        **options,
    )
    preprocess_chats(chat_options)
    return chat_options.shard_prefix


def chat_config(folder: Path, task: str, shard: str) -> dict[str, Any]:
    """A run of 4 steps of a model whose every axis divides by 2, on packed chats."""
    return {
        "task": task,
        "run": {"output_dir": str(folder / "run")},
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 600,
            "max_sequence_length": 256,
        },
        "precision": {"mode": "fp32"},
        "data": {"blend": [{"prefix": shard}], "split": [90, 10, 0], "sequence_length": 256},
        "batch": {"global": 4, "micro": 1},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 4},
        "logging": {"tensorboard": False},
    }


class TokenShard:
    """Documents given as tokens, in place of a `ChatShard`: (prompt tokens, answer tokens) each."""

    prefix = "tokens"

    def __init__(self, documents: list[tuple[list[int], list[int]]], task: Any) -> None:
        self.task = task
        self.documents_per_unit = 2 if task == "dpo" else 1
        self.units = len(documents) // self.documents_per_unit
        self.tokens = self
        self._documents = [np.array([*prompt, *answer]) for prompt, answer in documents]
        self._answers = [
            np.array([[len(prompt), len(prompt) + len(answer)]]) for prompt, answer in documents
        ]
        self.lengths_tokens = np.array([len(document) for document in self._documents])

    def unit_lengths_tokens(self) -> np.ndarray:
        """Tokens of each unit."""
        return self.lengths_tokens.reshape(self.units, -1).sum(axis=1)

    def read(self, document: int) -> np.ndarray:
        """A document's tokens."""
        return self._documents[document]

    def answers_of(self, document: int) -> np.ndarray:
        """Where its answer stands."""
        return self._answers[document]


def token_pairs(count: int, vocab_size: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Pairs as `TokenShard` takes them: every two documents have one prompt."""
    generator = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [generator.randrange(vocab_size) for _ in range(generator.randint(least, most))]

    documents = []
    for _ in range(count):
        prompt = tokens(1, 12)
        documents += [(prompt, tokens(1, 15)), (prompt, tokens(1, 15))]
    return documents
