"""The fast way from text to ids, trusted only after it has agreed with the reference tokenizer.

The reference (`litespark.data.tokenizers`) says what the ids are; it tokenizes 4 to 5 MB of text a
CPU-second.  gigatoken gives the same ids of a BPE some seven times as fast.  Two things keep it
exact: it is given the model without its control tokens, so that "</s>" in a document cannot become
one; and before a job it must agree with the reference on `EDGE_STRINGS`, on the text of every
added token, and on the beginnings of the user's own first documents.  Where it cannot read a model
or disagrees once, the reference does the work and the user is told.

gigatoken tokenizes each word once and remembers it.  In models of Llama's kind it parts words at
spaces alone, so the last word of a line and the first of the next make one, which is seldom met
again.  `cut_at_line_ends` rewrites such a model so that a line's end parts words too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from litespark.data.edge_strings import EDGE_STRINGS

if TYPE_CHECKING:
    from litespark.data.tokenizers import Tokenizer

# gigatoken remembers every word it has met and never forgets: some 10 bytes for each byte of text
# that is new.  Loading the model again (50 ms) every so often is what bounds it.
CACHE_BYTES = 80 << 20
_SHOWN_CHARACTERS = 40
_SPACE_MARK = "\u2581"
_BYTE_FALLBACK = re.compile(rb'"byte_fallback":\s*true')
_TO_SPACE_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}


class FastModel(NamedTuple):
    """What the fast engine loads: a `tokenizer.json`, and what to put before each text."""

    json: bytes
    prefix: bytes = b""

    def save(self, path: Path) -> None:
        """Write the model where other processes find it.

        Raises:
            OSError: when the disk is full.
        """
        path.write_bytes(self.prefix + b"\0" + self.json)

    @classmethod
    def load(cls, path: str) -> FastModel:
        """Return what `save` wrote."""
        prefix, _, content = Path(path).read_bytes().partition(b"\0")
        return cls(content, prefix)


def cut_at_line_ends(plain_json: bytes) -> FastModel:
    """Return a model whose words end at line ends too, with the same ids for every text.

    That is possible where no piece of several characters holds a line end: then no merge reaches
    across one, and what lies between two can be tokenized alone.  The line end becomes an added
    token with the id that it has anyway.  Before each part gigatoken would put the space mark that
    belongs before the whole text, so that step leaves the model and a space is put there instead.
    Other models are returned as they are.

    Args:
        plain_json: see `Tokenizer.plain_json`.
    """
    import orjson

    if not _BYTE_FALLBACK.search(plain_json):  # no need to read 10 MB of another kind
        return FastModel(plain_json)
    value = orjson.loads(plain_json)
    model, steps = value["model"], value.get("normalizer") or {}
    steps = steps.get("normalizers", [steps])
    prepended = steps[:1] == [{"type": "Prepend", "prepend": _SPACE_MARK}]
    vocab = model.get("vocab", {})
    line_end = vocab.get("\n", vocab.get("<0x0A>"))
    is_llamas_kind = (
        model.get("byte_fallback") is True
        and not value.get("pre_tokenizer")
        and not value.get("added_tokens")
        and steps[prepended:] == [_TO_SPACE_MARK]
    )
    if not is_llamas_kind or line_end is None or not _stands_alone("\n", "<0x0A>", model):
        return FastModel(plain_json)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    value["added_tokens"] = [{"id": line_end, "content": "\n", **flags}]
    value["normalizer"] = _TO_SPACE_MARK
    return FastModel(orjson.dumps(value), b" " if prepended else b"")


def _stands_alone(char: str, byte_piece: str, model: dict[str, Any]) -> bool:
    if any(char in piece for piece in model["vocab"] if piece != char):
        return False
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return not any(char in pair or byte_piece in pair for pair in pairs)


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # no Linux
        import psutil

        return psutil.Process().memory_info().rss


class FastEngine:
    """gigatoken over a model in `tokenizer.json` form; single-threaded, memory bounded.

    Args:
        model_json: see `Tokenizer.plain_json`.
        prefix: put before each text; see `FastModel`.

    Raises:
        RuntimeError: when gigatoken cannot read the model.
    """

    def __init__(self, model_json: bytes, prefix: bytes = b"") -> None:
        self._model_json = model_json
        self._prefix = prefix
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._tokenizer: Any = gigatoken.Tokenizer.from_json(self._model_json)
        self._limit_bytes = _resident_bytes() + CACHE_BYTES

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Return the ids of a text in UTF-8, uint32 [tokens]."""
        return self._tokenizer.encode(self._prefix + text if text else text)

    def trim(self) -> None:
        """Forget the words met when they take more than `CACHE_BYTES`; ids do not depend on it."""
        if _resident_bytes() > self._limit_bytes:
            del self._tokenizer  # first, so that the two are never there together
            self._load()


class ReferenceEngine:
    """The reference tokenizer behind the same two methods."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Return the ids of a text in UTF-8, uint32 [tokens]."""
        return np.array(self._tokenizer.encode(text.decode("utf-8")), dtype=np.uint32)

    def trim(self) -> None:
        """Nothing grows here."""


Engine = FastEngine | ReferenceEngine


def probe_texts(tokenizer: Tokenizer, documents: Iterable[str]) -> list[str]:
    """Return what the fast engine must get right: edge strings, added tokens, `documents`."""
    added = [t for token in tokenizer.added_tokens for t in (token, f"a{token} {token}b {token}")]
    return [*EDGE_STRINGS, *added, *documents]


def encode_texts(load: Callable[[], Engine], texts: Sequence[str]) -> list[list[int]] | str:
    """Return the ids that an engine gives each text, or why it cannot be loaded."""
    try:
        engine = load()
        return [engine.encode(text.encode("utf-8")).tolist() for text in texts]
    except RuntimeError as error:  # all that its Rust side raises
        return f"gigatoken cannot read the model ({error})"
    except ImportError as error:  # no binary for this platform, say
        return f"gigatoken cannot be imported ({error})"
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what a panic in Rust is here: no Exception
            raise
        return f"gigatoken fails ({error})"


def reason_against(
    texts: Sequence[str], ids: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]
) -> str | None:
    """Return why an engine that gave these ids is not to be used, None when all are right."""
    for text, found, right in zip(texts, ids, expected, strict=True):
        if found != right:
            return f"gigatoken gives other ids than the reference for {text[:_SHOWN_CHARACTERS]!r}"
    return None
