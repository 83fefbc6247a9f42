"""Vocabularies in tiktoken's manner: Llama 3's `tokenizer.model` and Mistral's `tekken.json`.

Such a file holds byte strings with their ranks.  A text is first cut into words by a regular
expression, then each word's bytes are merged, the pair whose joined string has the lowest rank
first.  Llama 3's file has one line a rank, "base64 rank", and leaves the expression and the control
tokens to Meta's code; the numbers below are those of Llama 3.  `tekken.json` holds all of it, and
its control tokens come first: id = rank + their number.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litespark.errors import MissingExtraError, UserError

TEKKEN_NAME = "tekken.json"
_LLAMA3_RANKS = 128_000
_LLAMA3_CONTROL_TOKENS = 256
_LLAMA3_BOS, _LLAMA3_EOS = 128_000, 128_001  # <|begin_of_text|>, <|end_of_text|>
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Ranks:
    """What both files come to: id = rank + `first_id`."""

    ranks: dict[bytes, int]
    pattern: str
    first_id: int
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    control_tokens: tuple[str, ...]


def is_rank_lines(content: bytes) -> bool:
    """Return whether a file's first line is a base64 string and a rank, as in Llama 3's."""
    parts = content[:400].split(b"\n", 1)[0].split()
    if len(parts) != 2 or not parts[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(parts[0], validate=True))
    except binascii.Error:
        return False


class TiktokenTokenizer:
    """Ranks in tiktoken's manner; see `litespark.data.tokenizers.Tokenizer`.

    Args:
        file: the path the content was read from.
        content: the file's bytes.

    Raises:
        UserError: when the file is not one of the two kinds, or tiktoken is not installed.
    """

    def __init__(self, file: Path, content: bytes) -> None:
        read = _read_tekken if file.suffix == ".json" else _read_llama3
        try:
            self._ranks = read(content)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                str(file), f"is not a vocabulary of ranks ({error})", "Name the right file."
            ) from error
        try:
            import tiktoken
        except ImportError as error:
            raise MissingExtraError("tiktoken", "tiktoken", f"tokenizer {file}") from error
        self._encoding: Any = tiktoken.Encoding(
            file.name,
            pat_str=self._ranks.pattern,
            mergeable_ranks=self._ranks.ranks,
            special_tokens={},
        )
        self.vocab_size = self._ranks.vocab_size
        self.bos_id = self._ranks.bos_id
        self.eos_id = self._ranks.eos_id
        self.identity = hashlib.sha256(content).hexdigest()
        self.path = file
        beside = (file.with_name(name) for name in ("tokenizer_config.json", "params.json"))
        self.files = (file, *(path for path in beside if path.is_file()))
        self.added_tokens = self._ranks.control_tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without BOS or EOS."""
        first_id = self._ranks.first_id
        return [rank + first_id for rank in self._encoding.encode_ordinary(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; control tokens give no text."""
        first_id, count = self._ranks.first_id, len(self._ranks.ranks)
        ranks = [int(i) - first_id for i in ids if 0 <= int(i) - first_id < count]
        return self._encoding.decode(ranks)

    def plain_json(self) -> bytes | None:
        """Return the model as a `tokenizer.json` without control tokens."""
        import orjson

        names = str.maketrans(dict(enumerate(_byte_names())))
        first_id = self._ranks.first_id
        ranks = {
            token.decode("latin-1").translate(names): rank
            for token, rank in self._ranks.ranks.items()
        }
        split = {"type": "Split", "pattern": {"Regex": self._ranks.pattern}}
        value = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    split | {"behavior": "Isolated", "invert": False},
                    _BYTE_LEVEL | {"use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": _BYTE_LEVEL | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {text: rank + first_id for text, rank in ranks.items()},
                "merges": _merges(ranks),
            },
        }
        return orjson.dumps(value)


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _merges(ranks: dict[str, int]) -> list[str]:
    """Return every split "left right" of every token into two tokens, lowest rank first."""
    merges: list[str] = []
    for text in sorted(ranks, key=ranks.__getitem__):
        found = [
            (ranks[text[:place]], ranks[text[place:]], place)
            for place in range(1, len(text))
            if text[:place] in ranks and text[place:] in ranks
        ]
        found.sort()
        merges += [f"{text[:place]} {text[place:]}" for _, _, place in found]
    return merges


def _byte_names() -> list[str]:
    """Return the printable character that stands for each byte in byte-level vocabularies."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    names, others = [], 0
    for byte in range(256):
        names.append(chr(byte) if byte in printable else chr(256 + others))
        others += byte not in printable
    return names


def _read_llama3(content: bytes) -> _Ranks:
    ranks: dict[bytes, int] = {}
    for line in content.splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    _check_ranks(ranks)
    if len(ranks) != _LLAMA3_RANKS:
        raise ValueError(
            f"it has {len(ranks)} ranks and Llama 3 has {_LLAMA3_RANKS}; the regular expression of "
            "another vocabulary is not in its file, so use its tokenizer.json"
        )
    return _Ranks(
        ranks,
        _LLAMA3_PATTERN,
        first_id=0,
        vocab_size=_LLAMA3_RANKS + _LLAMA3_CONTROL_TOKENS,
        bos_id=_LLAMA3_BOS,
        eos_id=_LLAMA3_EOS,
        control_tokens=("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    )


def _read_tekken(content: bytes) -> _Ranks:
    import orjson

    value = orjson.loads(content)
    config = value["config"]
    control_count = int(config["default_num_special_tokens"])
    vocab_size = int(config["default_vocab_size"])
    count = vocab_size - control_count  # the file may hold more ranks than its model uses
    ranks = {
        base64.b64decode(entry["token_bytes"]): int(entry["rank"])
        for entry in value["vocab"][:count]
    }
    _check_ranks(ranks)
    named = value.get("special_tokens") or [
        {"rank": 1, "token_str": "<s>"},
        {"rank": 2, "token_str": "</s>"},
    ]
    id_of = {str(token["token_str"]): int(token["rank"]) for token in named}
    return _Ranks(
        ranks,
        str(config["pattern"]),
        first_id=control_count,
        vocab_size=vocab_size,
        bos_id=id_of.get("<s>"),
        eos_id=id_of.get("</s>"),
        control_tokens=tuple(id_of),
    )


def _check_ranks(ranks: dict[bytes, int]) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks do not count from 0 without a gap")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("it lacks some of the 256 bytes")
