"""Conversations and pairs packed whole into samples, as an endless sequence like a `Corpus`.

The units of a range are packed once (`packing`), in an order drawn from the seed.  Each epoch then
takes the samples in an order of its own.  Which units share a sample changes nothing: a token sees
its own document only, and losses are summed over all answers of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from litespark.data.blend import Blend, Part, part_range
from litespark.data.chat_shards import ChatShard, Task
from litespark.data.packing import pack
from litespark.data.sample import IntArray, Sample
from litespark.data.sample_index import random_order
from litespark.errors import UserError

_PACKING, _SAMPLES = 2, 3  # purposes of random orders, apart from those of plain text


@dataclass(frozen=True, eq=False)
class ChatSample(Sample):
    """A sample of whole documents, of which only the answers count.

    Attributes:
        answer_mask: fp32 [S], 1 where the label is a token of an answer.
        documents: int64 [d], the documents' numbers in their shard, in the order of the sample.
        document_of: int64 [S], which of them the label belongs to where it counts, else -1.
        reference_logps: fp32 [d], log-probability of each document's answers under the reference
            model; None where there is none.
    """

    answer_mask: npt.NDArray[np.float32]
    documents: IntArray
    document_of: IntArray
    reference_logps: npt.NDArray[np.float32] | None

    def loss_mask(self, document_mask: bool) -> npt.NDArray[np.float32]:
        """1 where a label counts, fp32 [S]; answers never cross the end of their document."""
        return self.answer_mask


class ChatCorpus:
    """Samples of `sequence_length` tokens from a range of a shard's units.

    Args:
        shard: the open shard.
        unit_range: the units [start, stop) in stored order.
        sequence_length: S, in tokens; no unit may be longer.
        seed: of the orders, 0 or more.
        reference_logps: fp32 [documents of the shard], see `ChatSample`.

    Raises:
        UserError: a unit is longer than S, or there is none.
    """

    def __init__(
        self,
        shard: ChatShard,
        unit_range: tuple[int, int],
        sequence_length: int,
        seed: int,
        reference_logps: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self.shard, self.prefix = shard, shard.prefix
        self.unit_range = unit_range
        self.sequence_length = sequence_length
        self.seed = seed
        self.reference_logps = reference_logps
        start, stop = unit_range
        lengths = shard.unit_lengths_tokens()[start:stop]
        _check_lengths(shard, lengths, sequence_length)
        order = random_order(seed, 0, _PACKING, len(lengths))
        sample_of = pack(lengths[order], sequence_length)
        self._units = start + order[np.argsort(sample_of, kind="stable")]
        self._ends = np.cumsum(np.bincount(sample_of))
        self.samples_per_epoch = len(self._ends)
        self.tokens = int(lengths.sum())
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def fill(self) -> float:
        """Share of the places that hold a token."""
        return self.tokens / (self.samples_per_epoch * self.sequence_length)

    def read(self, index: int) -> ChatSample:
        """Return sample `index`, 0 or more and without end."""
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, position = divmod(index, self.samples_per_epoch)
        return self.read_packed(int(self._order_of(epoch)[position]))

    def read_packed(self, number: int) -> ChatSample:
        """Return the packed sample `number` of `samples_per_epoch`, in no random order."""
        first = int(self._ends[number - 1]) if number else 0
        per_unit = self.shard.documents_per_unit
        units = self._units[first : int(self._ends[number])]
        documents = (units[:, None] * per_unit + np.arange(per_unit)).ravel()
        return self._joined(documents)

    def _order_of(self, epoch: int) -> IntArray:
        # Kept of one epoch: making it again, where two threads alternate, costs time only.
        known, order = self._epoch, self._order
        if known != epoch:
            order = random_order(self.seed, epoch, _SAMPLES, self.samples_per_epoch)
            self._epoch, self._order = epoch, order
        return order

    def _joined(self, documents: IntArray) -> ChatSample:
        length = self.sequence_length
        tokens = np.zeros(length + 1, dtype=np.int64)
        document_of = np.full(length, -1, dtype=np.int64)
        ends = np.cumsum(self.shard.lengths_tokens[documents])
        for place, document in enumerate(documents.tolist()):
            ids = self.shard.tokens.read(document)
            start = int(ends[place]) - len(ids)
            tokens[start : start + len(ids)] = ids
            for first, stop in self.shard.answers_of(document).tolist():
                # The label of a place is the token after it; a first token has no place before it.
                document_of[start + max(first, 1) - 1 : start + stop - 1] = place
        reference = self.reference_logps
        return ChatSample(
            tokens=tokens,
            document_ends=ends.astype(np.int64),
            tokens_used=int(ends[-1]),
            answer_mask=(document_of >= 0).astype(np.float32),
            documents=documents,
            document_of=document_of,
            reference_logps=None if reference is None else reference[documents],
        )


def _check_lengths(shard: ChatShard, lengths: IntArray, sequence_length: int) -> None:
    what = "pairs" if shard.task == "dpo" else "conversations"
    if not len(lengths):
        raise UserError(
            shard.prefix, f"gives none of its {shard.units} {what}", "Change the split."
        )
    too_long = int((lengths > sequence_length).sum())
    if too_long:
        raise UserError(
            f"data.sequence_length = {sequence_length}",
            f"is shorter than {too_long} of {len(lengths)} {what} of {shard.prefix}, whose longest "
            f"has {lengths.max()} tokens",
            f"Raise it, or write the shard with --max-length {sequence_length}, which counts what "
            "it leaves out.",
        )


def open_chats(
    entries: Sequence[tuple[str, float]],
    split: tuple[float, float, float],
    parts: Sequence[Part],
    sequence_length: int,
    seed: int,
    task: Task,
) -> list[Blend[ChatCorpus] | None]:
    """Open parts of a blend of shards for `task`, as `open_blends` does of plain text.

    Raises:
        UserError: a shard is missing, damaged or of another task, a unit is too long, or a part is
            empty.
    """
    if not entries:
        raise UserError("data.blend", "names no shard", "Add an entry with a prefix and a weight.")
    shards = [ChatShard(prefix, task) for prefix, _ in entries]
    blends: list[Blend[ChatCorpus] | None] = []
    for part in parts:
        ranges = [part_range(shard.prefix, shard.units, split, part) for shard in shards]
        if any(units is None for units in ranges):
            blends.append(None)
            continue
        corpora = [
            ChatCorpus(shard, units, sequence_length, seed)
            for shard, units in zip(shards, ranges, strict=True)
            if units is not None
        ]
        blends.append(Blend(corpora, [weight for _, weight in entries]))
    return blends
