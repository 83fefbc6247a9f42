"""The fast way from text to ids, trusted only after it has agreed with the reference tokenizer.

The reference (`litespark.data.tokenizers`) says what the ids are; it tokenizes 4 to 5 MB of text a
CPU-second.  gigatoken gives the same ids of a BPE some seven times as fast.  Two things keep it
exact: it is given the model without its control tokens, so that "</s>" in a document cannot become
one; and before a job it must agree with the reference on `EDGE_STRINGS`, on the text of every
added token, and on the beginnings of the user's own first documents.  Where it cannot read a model
or disagrees once, the reference does the work and the user is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from litespark.data.edge_strings import EDGE_STRINGS

if TYPE_CHECKING:
    from litespark.data.tokenizers import Tokenizer

# gigatoken remembers every word it has met and never forgets: some 10 bytes for each byte of text
# that is new.  Loading the model again (50 ms) every so often is what bounds it.
CACHE_BYTES = 80 << 20
_SHOWN_CHARACTERS = 40


class FastEngine:
    """gigatoken over a model in `tokenizer.json` form; single-threaded, memory bounded.

    Args:
        model_json: see `Tokenizer.plain_json`.

    Raises:
        RuntimeError: when gigatoken cannot read the model.
    """

    def __init__(self, model_json: bytes) -> None:
        import psutil

        self._model_json = model_json
        self._memory = psutil.Process()
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._tokenizer: Any = gigatoken.Tokenizer.from_json(self._model_json)
        self._limit_bytes = self._memory.memory_info().rss + CACHE_BYTES

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Return the ids of a text in UTF-8, uint32 [tokens]."""
        return self._tokenizer.encode(text)

    def trim(self) -> None:
        """Forget the words met when they take more than `CACHE_BYTES`; ids do not depend on it."""
        if self._memory.memory_info().rss > self._limit_bytes:
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


def reason_against(
    tokenizer: Tokenizer, model_json: bytes | None, documents: Iterable[str]
) -> str | None:
    """Try the fast engine on edge strings and on `documents`; return why not to use it, or None."""
    if model_json is None:
        return "gigatoken does not know this kind of tokenizer"
    try:
        engine = FastEngine(model_json)
    except RuntimeError as error:  # all that its Rust side raises
        return f"gigatoken cannot read the model ({error})"
    different = first_difference(tokenizer, engine, documents)
    if different is not None:
        return f"gigatoken gives other ids than the reference for {different[:_SHOWN_CHARACTERS]!r}"
    return None


def first_difference(
    tokenizer: Tokenizer, engine: FastEngine, documents: Iterable[str]
) -> str | None:
    """Return the first text on which the two disagree, or None."""
    for text in _probes(tokenizer, documents):
        if engine.encode(text.encode("utf-8")).tolist() != tokenizer.encode(text):
            return text
    return None


def _probes(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterable[str]:
    yield from EDGE_STRINGS
    for token in tokenizer.added_tokens:
        yield token
        yield f"a{token} {token}b {token}"
    yield from documents
