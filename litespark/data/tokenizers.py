"""Tokenizers from local files, under one small protocol.

Three kinds of file are read: `tokenizer.json` (the `tokenizers` library), a sentencepiece `.model`,
and ranks in tiktoken's manner (Llama 3's `tokenizer.model`, Mistral's `tekken.json`).  Documents
are data, so their text is never read as instructions: a literal "</s>" in a document becomes the
pieces of those four characters, not the control token, and no BOS or EOS is added by `encode`.
The file's bytes are read once, hashed and parsed from memory, so the hash names what was really
used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from litespark.data.sentencepiece_files import sentencepiece_to_json
from litespark.data.tiktoken_files import TEKKEN_NAME, TiktokenTokenizer, is_rank_lines
from litespark.errors import UserError

_JSON_NAME = "tokenizer.json"
_MODEL_NAME = "tokenizer.model"
_MODEL_FILE_NAMES = (_JSON_NAME, _MODEL_NAME, TEKKEN_NAME)  # in this order of preference
# Written beside a tokenizer by Hugging Face tools; an export ships those that exist.
_COMPANION_NAMES = (
    _JSON_NAME,
    _MODEL_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
MAX_FILE_BYTES = 1 << 29  # the largest known vocabularies need 20 MB


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: the largest id + 1, added tokens included.
        bos_id, eos_id: the control tokens' ids, None when the tokenizer has none.
        identity: SHA-256 of the model file's bytes, 64 hexadecimal digits.
        path: the model file.
        files: the model file and those beside it that an export ships.
        added_tokens: texts that the library would, if it were asked to, turn into one token.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    identity: str
    path: Path
    files: tuple[Path, ...]
    added_tokens: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without BOS or EOS."""
        ...

    def plain_json(self) -> bytes | None:
        """Return the model as a `tokenizer.json` without control tokens, None if it has no such."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; control tokens give no text."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder or from its file: `tokenizer.json`, `.model`, `tekken.json`.

    A folder that holds several gives its `tokenizer.json`, as `transformers` would.

    Raises:
        UserError: when there is no such file, or it is not what its name says.
    """
    if not str(path):  # Path("") is the current folder, which nobody named
        raise UserError("tokenizer ''", "is empty", "Name a folder or a file; is a variable unset?")
    file = _find_model_file(Path(path))
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UserError(str(file), "the file is too large for a tokenizer", "Name its file.")
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            str(file), f"cannot be read: {error.strerror}", "Check the path."
        ) from error
    if file.name == TEKKEN_NAME or is_rank_lines(content):
        return TiktokenTokenizer(file, content)
    if file.suffix == ".json":
        return JsonTokenizer(file, content)
    return SentencePieceTokenizer(file, content)


def _find_model_file(path: Path) -> Path:
    if path.is_dir():
        for name in _MODEL_FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"tokenizer {path}",
            f"the folder holds none of {', '.join(_MODEL_FILE_NAMES)}",
            "Name a folder that does, or the file itself.",
        )
    if not path.is_file():
        raise UserError(
            f"tokenizer {path}",
            "no such file or folder",
            f"Name a local folder with {_JSON_NAME} or {_MODEL_NAME}, or such a file; "
            "nothing is fetched from a model hub.",
        )
    if path.suffix not in (".json", ".model"):
        raise UserError(
            f"tokenizer {path}",
            "the suffix is neither .json nor .model",
            f"Name a {_JSON_NAME}, a {TEKKEN_NAME}, or a .model file of sentencepiece or Llama 3.",
        )
    return path


def _files_to_ship(file: Path) -> tuple[Path, ...]:
    beside = [file.with_name(name) for name in _COMPANION_NAMES if name != file.name]
    return (file, *(path for path in beside if path.is_file()))


def _read_companion(file: Path, name: str) -> dict[str, Any]:
    companion = file.with_name(name)
    if not companion.is_file():
        return {}
    try:
        value = json.loads(companion.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            str(companion), f"is not valid JSON ({error})", "Fetch it again."
        ) from error
    return value if isinstance(value, dict) else {}


class JsonTokenizer:
    """A `tokenizer.json`; see `Tokenizer`.

    The library takes some 0.4 s for a vocabulary of 131,000, and a run that only asks for sizes and
    control tokens does not need it: it reads the file at the first text.

    Raises:
        UserError: when the file is no tokenizer; from `encode` and `decode` when the library cannot
            read what its JSON holds.
    """

    def __init__(self, file: Path, content: bytes) -> None:
        self._content = content
        self.path = file
        value = _parsed(content)
        facts = _vocabulary(value)
        if facts is None:
            ids = self._library.get_vocab(with_added_tokens=True)
            added = self._library.get_added_tokens_decoder().values()
            facts = ids, tuple(str(token.content) for token in added)
        ids, self.added_tokens = facts
        if not ids:
            raise UserError(str(file), "the vocabulary is empty", "Name a trained tokenizer.")
        self.vocab_size = max(ids.values()) + 1
        self.bos_id = self._control_id(file, ids, "bos_token", _USUAL_BOS)
        self.eos_id = self._control_id(file, ids, "eos_token", _USUAL_EOS)
        self.identity = hashlib.sha256(content).hexdigest()
        self.files = _files_to_ship(file)
        # Here, where the file is parsed: to parse it again takes longer than all of this.
        self._plain_json = _without_control_tokens(value)

    @cached_property
    def _library(self) -> Any:
        tokenizer = self.with_control_tokens()
        tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        return tokenizer

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts of the special tokens."""
        added = self._library.get_added_tokens_decoder().values()
        return tuple(str(token.content) for token in added if token.special)

    def with_control_tokens(self) -> Any:
        """A `tokenizers.Tokenizer` of the file that takes control tokens in a text as such.

        Raises:
            UserError: the library cannot read the file.
        """
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                str(self.path), f"is not a tokenizer.json: {error}", "Name the right file."
            ) from error
        # A file may ask for truncation (many published ones do); a document is never cut.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _control_id(
        self, file: Path, ids: dict[str, int], field: str, usual_names: Sequence[str]
    ) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_companion(file, name).get(field)
            if isinstance(token, dict):  # an AddedToken written out
                token = token.get("content")
            if not isinstance(token, str):
                continue
            if token not in ids:
                raise UserError(
                    str(file.with_name(name)),
                    f"{field} is {token!r}, which the vocabulary of {file.name} lacks",
                    "Repair the file; the two belong to different tokenizers.",
                )
            return ids[token]
        return next((ids[name] for name in usual_names if name in ids), None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without BOS or EOS."""
        return self._library.encode(text, add_special_tokens=False).ids

    def plain_json(self) -> bytes | None:
        """Return the model as a `tokenizer.json` without control tokens, None if it has no such."""
        return self._plain_json

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; control tokens give no text."""
        return self._library.decode(list(ids), skip_special_tokens=True)


def _parsed(content: bytes) -> Any:
    """Return the file's JSON, None when it has none; what is no tokenizer the library refuses."""
    import orjson

    try:
        return orjson.loads(content)
    except ValueError:
        return None


def _vocabulary(value: Any) -> tuple[dict[str, int], tuple[str, ...]] | None:
    """Return the ids by text and the added tokens' texts, as the library would give them.

    None where that takes the library: a model that is no table of ids, or an added token whose id
    in the file is not the one that the library would choose.
    """
    try:
        ids = dict(value["model"]["vocab"].items())
        added = value.get("added_tokens") or []
        next_id = len(ids)
        if not all(type(i) is int for i in ids.values()):
            return None
        for token in added:
            known_id = ids.get(token["content"], next_id)
            if token["id"] != known_id:
                return None
            next_id += token["content"] not in ids
            ids[token["content"]] = known_id
        return ids, tuple(token["content"] for token in added)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _without_control_tokens(value: Any) -> bytes | None:
    """See `Tokenizer.plain_json`; `value` is what a `tokenizer.json` holds."""
    import orjson

    if value is None:
        return None
    model = value.get("model") or {}
    if model.get("type") != "BPE" or model.get("dropout"):
        return None
    added = value.get("added_tokens") or []
    # `encode_special_tokens` spares the special ones; the others are cut out of a text.
    kept = [token for token in added if not token.get("special")]
    nothing = dict.fromkeys(("truncation", "padding", "post_processor"))
    return orjson.dumps({**value, **nothing, "added_tokens": kept})


class SentencePieceTokenizer:
    """A sentencepiece `.model`; see `Tokenizer`.

    sentencepiece gives control pieces no surface form, so text never turns into them.
    """

    def __init__(self, file: Path, content: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise UserError(
                str(file),
                "is not a sentencepiece model",
                f"Name a sentencepiece file, or the {_JSON_NAME} beside it.",
            ) from error
        added = _read_companion(file, "added_tokens.json").values()
        added_ids = [token_id for token_id in added if isinstance(token_id, int)]
        self.vocab_size = max([self._processor.vocab_size(), *(i + 1 for i in added_ids)])
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())
        self._content = content
        self.identity = hashlib.sha256(content).hexdigest()
        self.path = file
        self.files = _files_to_ship(file)
        size = range(self._processor.vocab_size())
        self.added_tokens = tuple(
            self._processor.IdToPiece(i) for i in size if self._processor.IsControl(i)
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without BOS or EOS."""
        return self._processor.EncodeAsIds(text)

    def plain_json(self) -> bytes | None:
        """Return the model as a `tokenizer.json` without control tokens, None if it has no such."""
        return sentencepiece_to_json(self._content)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; control tokens and ids beyond the model give no text."""
        size = self._processor.vocab_size()
        return self._processor.DecodeIds([int(i) for i in ids if 0 <= i < size])


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
