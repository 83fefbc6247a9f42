"""A shard of conversations or preference pairs, opened: tokens, answers, and where they belong.

`chat_job` says what the two files hold.  They are checked against each other when they are opened,
for an answer that stands elsewhere would train a model on its prompts without a word.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import numpy.typing as npt

from litespark.data.indexed import IndexedReader, bin_path
from litespark.data.manifest import Manifest, manifest_path, read_manifest
from litespark.data.verify import check_counts
from litespark.errors import UserError

Task = Literal["sft", "dpo"]
_TOKENS_ENDING, _ANSWERS_ENDING = "_document", "_answers"


def answers_prefix(prefix: str) -> str:
    """The prefix of the shard of answers that belongs to a shard of tokens."""
    return prefix.removesuffix(_TOKENS_ENDING) + _ANSWERS_ENDING


class ChatShard:
    """The documents of a shard with their answers; threads may share it.

    A *unit* is what must not be torn: a conversation, or the two halves of a pair.

    Raises:
        UserError: a file is missing or damaged, of another task, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str], task: Task) -> None:
        self.prefix = os.fspath(prefix)
        self.task = task
        self.manifest = _manifest_of(self.prefix, task)
        self.tokens = IndexedReader(self.prefix)
        self._answers = IndexedReader(answers_prefix(self.prefix))
        check_counts(self.prefix, self.tokens.index, self.manifest)
        self.documents_per_unit = 2 if task == "dpo" else 1
        self.units = self.tokens.documents // self.documents_per_unit
        self.lengths_tokens = self.tokens.document_lengths_tokens
        self._check_answers()

    def unit_lengths_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each unit, int64 [units]."""
        return self.lengths_tokens.reshape(self.units, self.documents_per_unit).sum(axis=1)

    def answers_of(self, document: int) -> npt.NDArray[np.int64]:
        """Where a document's answers stand in it, tokens [start, stop); int64 [answers, 2]."""
        return self._answers.read(document).astype(np.int64).reshape(-1, 2)

    @property
    def identity(self) -> str:
        """SHA-256 of tokens and answers together, from the manifest."""
        assert self.manifest.chats is not None, "checked when it was opened"
        return f"{self.manifest.files.bin_sha256}{self.manifest.chats.answers.bin_sha256}"

    def _check_answers(self) -> None:
        """The answers rise within each document and end before it does."""
        assert self.manifest.chats is not None, "checked when it was opened"
        where = str(bin_path(answers_prefix(self.prefix)))
        expected = self.manifest.chats.answers
        found = self._answers.index
        counts = self._answers.document_lengths_tokens
        same = (found.documents, found.bin_bytes) == (expected.documents, expected.bin_bytes)
        if not same or found.documents != self.tokens.documents or bool((counts % 2).any()):
            raise _torn(where)
        places = np.concatenate([self._answers.read(n) for n in range(found.documents)])
        owners = np.repeat(np.arange(found.documents), counts)
        rises = np.diff(places) > 0
        within = np.diff(owners) == 0
        if not bool((rises | ~within).all()) or bool((places < 0).any()):
            raise _torn(where)
        if bool((places > self.lengths_tokens[owners]).any()):
            raise _torn(where)


def _torn(where: str) -> UserError:
    return UserError(
        where,
        "does not belong to the shard of tokens beside it, or is damaged",
        "Write the shard again with litespark preprocess.",
    )


def _manifest_of(prefix: str, task: Task) -> Manifest:
    manifest = read_manifest(prefix)
    if manifest is None or manifest.chats is None:
        raise UserError(
            prefix,
            f"is no shard of task {task}: {manifest_path(prefix)} "
            + ("is not there" if manifest is None else "tells of plain text"),
            f"Write one with litespark preprocess --task {task}.",
        )
    if manifest.chats.task != task:
        raise UserError(
            prefix,
            f"was written with --task {manifest.chats.task}, and the run's task is {task}",
            f"Name a shard written with --task {task}, or set task={manifest.chats.task}.",
        )
    return manifest
