"""A sentencepiece BPE model rewritten as the equivalent `tokenizer.json`.

Sentencepiece keeps pieces with scores and merges, at each step, the neighbours whose joined piece
scores best, the leftmost first.  `tokenizer.json` keeps an ordered list of pairs.  The list that
does the same has every split of every piece into two pieces, in the order of the joined piece's
score.  Control pieces, byte pieces and the unknown piece come from no merge and are in no pair.

The model file is a protobuf message (sentencepiece_model.proto); the few fields needed are read
here, because the library shows neither the normalizer nor which pieces are the user's own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

_SPACE_MARK = "\u2581"
# Numbers of fields and of enum values.
_MODEL_PIECES, _MODEL_TRAINER, _MODEL_NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TYPE_NORMAL, _TYPE_UNKNOWN, _TYPE_USER_DEFINED, _TYPE_UNUSED, _TYPE_BYTE = 1, 2, 4, 5, 6
_TRAINER_MODEL_TYPE, _TRAINER_SUFFIX, _TRAINER_BYTE_FALLBACK = 3, 24, 35
_MODEL_TYPE_BPE = 2
_FLOAT = struct.Struct("<f")
_RULES, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5


def sentencepiece_to_json(content: bytes) -> bytes | None:
    """Return the `tokenizer.json` of a model of Llama's kind, None for any other.

    Of Llama's kind: BPE, byte fallback with all 256 byte pieces, text left as it is but for the
    spaces, no pieces of the user's own.
    """
    import orjson

    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(content):
            if number == _MODEL_PIECES:
                pieces.append(_piece(value))
            elif number == _MODEL_TRAINER:
                trainer = dict(_fields(value))
            elif number == _MODEL_NORMALIZER:
                normalizer = dict(_fields(value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        return None  # a message this reader does not understand is left to the library
    if not _is_llamas_kind(pieces, trainer, normalizer):
        return None
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}]
    if normalizer.get(_ADD_DUMMY_PREFIX, 1):
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE_MARK})
    unknown = next((text for text, _, kind in pieces if kind == _TYPE_UNKNOWN), None)
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: index for index, (text, _, _) in enumerate(pieces)},
            "merges": _merges({text: score for text, score, kind in pieces if kind == 1}),
        },
    }
    return orjson.dumps(value)


def _is_llamas_kind(
    pieces: list[tuple[str, float, int]], trainer: dict[int, Any], normalizer: dict[int, Any]
) -> bool:
    kinds = [kind for _, _, kind in pieces]
    plain_text = (
        not normalizer.get(_RULES)
        and not normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1)
        and normalizer.get(_ESCAPE_WHITESPACES, 1)
        and not trainer.get(_TRAINER_SUFFIX, 0)
    )
    plain_merging = (
        trainer.get(_TRAINER_MODEL_TYPE) == _MODEL_TYPE_BPE
        and trainer.get(_TRAINER_BYTE_FALLBACK)
        and kinds.count(_TYPE_BYTE) == 256
    )
    own_pieces = _TYPE_USER_DEFINED in kinds or _TYPE_UNUSED in kinds
    return bool(plain_text and plain_merging and not own_pieces)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every split of every piece, best score first; `scores` is of the normal pieces."""
    # Of one piece's splits the longer left side comes first, as converters of Llama's files do;
    # where all else is equal, the earlier piece, hence the count down from 0.
    found = [
        (score, place, len(text) - place, -number, text)
        for number, (text, score) in enumerate(scores.items())
        for place in range(1, len(text))
        if text[:place] in scores and text[place:] in scores
    ]
    found.sort(reverse=True)
    return [(text[:place], text[place:]) for _, place, _, _, text in found]


def _piece(message: bytes) -> tuple[str, float, int]:
    # Nearly all are a short text and a score, in this order; reading those so halves the time.
    length = len(message) - 7
    if length > 0 and message[:2] == bytes((0x0A, length)) and message[length + 2] == 0x15:
        return message[2:-5].decode("utf-8"), _FLOAT.unpack(message[-4:])[0], _TYPE_NORMAL
    fields = dict(_fields(message))
    score = _FLOAT.unpack(fields[_PIECE_SCORE])[0] if _PIECE_SCORE in fields else 0.0
    return fields[_PIECE_TEXT].decode("utf-8"), score, fields.get(_PIECE_TYPE, _TYPE_NORMAL)


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
