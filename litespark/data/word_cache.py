"""Tokenize each distinct word once, with ids that equal the tokenizer's own, for Llama-type BPE.

Text repeats its words, and a tokenizer spends its time on merging the same characters again.  If
no piece of the vocabulary contains a pair of neighbouring characters xy, then no merge ever joins
x to y: the text may be cut between them and its sides tokenized apart.  In vocabularies of
Llama's type spaces lead pieces ("_the"), newlines and digits stand alone, and ASCII letters never
share a piece with ASCII punctuation.  So a text can be cut

    before a space that follows another character    between an ASCII letter and ASCII punctuation
    before and after a newline                       before and after a digit (but for its space)

into words like " the" and "(", almost all of which have been seen before.  The vocabulary
is checked for both properties when it is loaded; any other tokenizer, and any text with a literal
"_" (U+2581, which the tokenizer cannot tell from a space), goes the ordinary way.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

SPACE_MARK = "\u2581"
_MARKS = r"!-/:-@\[-`{-~"  # ASCII punctuation, as a range of a regular expression
# Other characters (accents, tabs, other scripts) promise nothing about their neighbours: a run
# that meets one goes on to the next space, newline or digit.
_WORD = re.compile(
    r"\n| *(?:"
    rf"[A-Za-z]+(?=[{_MARKS}0-9 \n]|\Z)|[{_MARKS}]+(?=[A-Za-z0-9 \n]|\Z)|[0-9]|[^ \n0-9]+"
    r")| +"
)
_SPANNING = re.compile(
    rf"[^{SPACE_MARK}]{SPACE_MARK}|.\n|\n.|.[0-9]|[0-9].|[A-Za-z][{_MARKS}]|[{_MARKS}][A-Za-z]",
    re.DOTALL,
)
_MAX_WORDS = 1 << 18  # some 60 MB when full; words met later are tokenized each time
_MAX_WORD_CHARACTERS = 48  # longer ones hardly ever come back


class WordCache:
    """Ids of texts, word by word; `encode` must be of a tokenizer that passed one of the checks."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._words = _Words(encode)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return exactly the ids of the tokenizer's own `encode`, int32 [tokens]."""
        if not text or SPACE_MARK in text:
            return np.array(self._encode(text), dtype=np.int32)
        # The tokenizer puts one space before a text; from here on it is part of the first word.
        words = _WORD.findall(" " + text)
        return np.frombuffer(b"".join(map(self._words.__getitem__, words)), dtype=np.int32)


class _Words(dict[str, bytes]):
    """Word -> its ids as bytes of int32, which join faster than lists; filled on demand."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode
        # A newline before the word keeps the tokenizer's own leading space away from it; the ids
        # of the two are the same for every word, and are dropped.
        self._lead = len(encode("\n"))

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._encode("\n" + word)[self._lead :], dtype=np.int32).tobytes()
        if len(word) <= _MAX_WORD_CHARACTERS and len(self) < _MAX_WORDS:
            self[word] = ids
        return ids


def pieces_can_be_cut(pieces: Iterable[str]) -> bool:
    """Return whether no piece spans a place where `WordCache` cuts."""
    return not any(" " in piece or _SPANNING.search(piece) for piece in pieces)


def json_can_be_cut(content: bytes) -> bool:
    """Return whether a `tokenizer.json` is a BPE of Llama's type whose pieces can be cut."""
    value = json.loads(content)
    model = value.get("model") or {}
    plain_merging = (
        model.get("type") == "BPE"
        and model.get("byte_fallback") is True  # no unknown tokens, which neighbours would share
        and not any(
            model.get(option)
            for option in (
                "dropout",
                "ignore_merges",
                "continuing_subword_prefix",
                "end_of_word_suffix",
            )
        )
    )
    prepend = {"type": "Prepend", "prepend": SPACE_MARK}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    plain_text = (
        value.get("normalizer") == {"type": "Sequence", "normalizers": [prepend, replace]}
        and value.get("pre_tokenizer") is None
        and all(token.get("special") for token in value.get("added_tokens") or [])
    )
    if not (plain_merging and plain_text):
        return False
    vocabulary = model.get("vocab") or {}
    # Neither byte pieces nor control tokens result from merging characters.
    byte_names = {f"<0x{byte:02X}>" for byte in range(256)}
    named = byte_names | {model.get("unk_token")} | {t["content"] for t in value["added_tokens"]}
    return byte_names <= set(vocabulary) and pieces_can_be_cut(set(vocabulary) - named)


# sentencepiece_model.proto, as far as it is needed here: numbers of fields and of enum values.
_MODEL_PIECES, _MODEL_TRAINER, _MODEL_NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_TYPE = 1, 3
_TYPE_NORMAL, _TYPE_USER_DEFINED, _TYPE_UNUSED, _TYPE_BYTE = 1, 4, 5, 6
_TRAINER_MODEL_TYPE, _TRAINER_SUFFIX, _TRAINER_BYTE_FALLBACK = 3, 24, 35
_MODEL_TYPE_BPE = 2
_RULES, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5


def sentencepiece_can_be_cut(content: bytes) -> bool:
    """Return whether a sentencepiece model is a BPE of Llama's type whose pieces can be cut."""
    pieces: list[str] = []
    byte_pieces = 0
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(content):
            if number == _MODEL_PIECES:
                piece = dict(_fields(value))
                kind = piece.get(_PIECE_TYPE, _TYPE_NORMAL)
                if kind in (_TYPE_USER_DEFINED, _TYPE_UNUSED):
                    return False
                byte_pieces += kind == _TYPE_BYTE
                if kind == _TYPE_NORMAL:  # the others, like <0x41>, match no text
                    pieces.append(piece[_PIECE_TEXT].decode("utf-8"))
            elif number == _MODEL_TRAINER:
                trainer = dict(_fields(value))
            elif number == _MODEL_NORMALIZER:
                normalizer = dict(_fields(value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        return False  # a message this reader does not understand is left to the library
    plain_text = (
        not normalizer.get(_RULES)
        and normalizer.get(_ADD_DUMMY_PREFIX, 1)
        and not normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1)
        and normalizer.get(_ESCAPE_WHITESPACES, 1)
        and not trainer.get(_TRAINER_SUFFIX, 0)
    )
    plain_merging = (
        trainer.get(_TRAINER_MODEL_TYPE) == _MODEL_TYPE_BPE
        and trainer.get(_TRAINER_BYTE_FALLBACK)
        and byte_pieces == 256
    )
    return bool(plain_text and plain_merging) and pieces_can_be_cut(pieces)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: int for varints, bytes otherwise."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        wire_type = key & 7
        if wire_type == 0:
            value, place = _varint(message, place)
        else:
            if wire_type == 2:
                length, place = _varint(message, place)
            elif wire_type in (1, 5):
                length = 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"wire type {wire_type}")
            value = message[place : place + length]
            place += length
            if place > len(message):
                raise ValueError("the message is cut short")
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return (value, place after it)."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place += 1
        shift += 7
        if byte < 0x80:
            return value, place
