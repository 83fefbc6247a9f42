"""From the blend to this rank's micro-batches, ahead of need and exactly resumable.

The global batch of a step is a run of consecutive samples of the blend.  Micro-batch m of
data-parallel rank r takes the samples

    consumed + (m * data_parallel_size + r) * micro_batch_size + j,   j = 0 .. micro_batch_size -
    1

so a step sees the same set of samples at every layout, and the loader's whole state is one
number: the samples consumed.  A thread builds the next steps while the device computes; only
steps that have been handed out count as consumed, so what it had prepared is simply prepared
again after a restart.  No random number is drawn here, so resuming cannot disturb anyone else's
generator.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from litespark.data.chat_samples import ChatSample
from litespark.data.sample import Sample
from litespark.errors import LitesparkError, UserError

_STEPS_AHEAD = 2


class SampleSource(Protocol):
    """What the loader needs of a blend: sample k."""

    def read(self, index: int, /) -> Sample:
        """Return sample `index`, 0 or more."""
        ...


class OutOfSamples(LitesparkError):
    """`max_samples` does not allow another step."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU.  Legend: b samples, s sequence.

    Attributes:
        tokens_bs: int64, the input ids.
        labels_bs: int64, the ids one place later.
        position_ids_bs: int64, 0 .. s - 1 in each row; with document masks, from 0 on in each
            document.
        loss_mask_bs: float32, 1 where a label counts.
        cu_seqlens: int32 [documents + 1], where the documents of all rows begin, the rows one
            after another, and b * s; None without document masks.
        longest_document_tokens: of those documents; 0 without document masks.
        document_of_bs: int64: which of the rows' chats, from 0 on in the rows' order, a label that
            counts belongs to, else -1; None of plain text.
        documents: int64 [chats], their numbers in their shard; None of plain text.
        reference_logps: float32 [chats], see `ChatSample`; None where there are none.
    """

    tokens_bs: torch.Tensor
    labels_bs: torch.Tensor
    position_ids_bs: torch.Tensor
    loss_mask_bs: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    longest_document_tokens: int = 0
    document_of_bs: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None


class BatchLoader:
    """This data-parallel rank's share of each global batch, in order, without end.

    Args:
        samples: gives sample k.
        micro_batch_size: samples of one forward pass on one rank.
        global_batch_size: samples of one step over all ranks.
        data_parallel_rank, data_parallel_size: this rank among those that see different samples.
        consumed_samples: where to go on; the count of a saved run, whatever its layout was.
        max_samples: never consume beyond this many; None for no end.
        document_mask: tokens see their own document only (`data.document_mask`).

    Raises:
        UserError: when the global batch does not divide into the ranks' micro-batches.
    """

    def __init__(
        self,
        samples: SampleSource,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        max_samples: int | None = None,
        document_mask: bool = False,
    ) -> None:
        samples_at_once = micro_batch_size * data_parallel_size
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % samples_at_once:
            raise UserError(
                f"batch.global = {global_batch_size}",
                f"is not a multiple of batch.micro = {micro_batch_size} times the data-parallel "
                f"size {data_parallel_size}",
                f"Use a positive multiple of {max(samples_at_once, 1)}.",
            )
        if not 0 <= data_parallel_rank < data_parallel_size or consumed_samples < 0:
            raise ValueError(
                f"rank {data_parallel_rank} of {data_parallel_size}, {consumed_samples} consumed"
            )
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_micro_batches = global_batch_size // samples_at_once
        self.wait_seconds = 0.0
        self.samples = samples
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._consumed = consumed_samples
        self._max_samples = max_samples
        self._document_mask = document_mask
        self._closing = threading.Event()
        self._ready: queue.Queue[list[Batch] | Exception] = queue.Queue(_STEPS_AHEAD)
        self._thread: threading.Thread | None = None

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks in the steps handed out, those before the resume included."""
        return self._consumed

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next global batch; `wait_seconds` is the wait.

        Raises:
            OutOfSamples: when `max_samples` does not allow another step.
            Exception: whatever reading the samples raised; the loader is closed then.
        """
        if self._closing.is_set():
            raise RuntimeError("the loader is closed")
        if not self._allows_step(self._consumed):
            raise OutOfSamples(
                f"after {self._consumed} samples no global batch of {self.global_batch_size} is "
                f"left of {self._max_samples}"
            )
        if self._thread is None:
            # Started late, so that a loader made before a fork works in the child.
            self._thread = threading.Thread(
                target=self._prepare, args=(self._consumed,), name="batch-loader", daemon=True
            )
            self._thread.start()
        started = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds = time.perf_counter() - started
        if isinstance(item, Exception):
            self.close()
            raise item
        self._consumed += self.global_batch_size
        return item

    def close(self) -> None:
        """Stop and join the thread; may be called more than once."""
        self._closing.set()
        if self._thread is not None:
            with suppress(queue.Empty):  # room for what the thread holds, which it waits for
                self._ready.get_nowait()
            self._thread.join()
            self._thread = None

    def _allows_step(self, consumed: int) -> bool:
        return self._max_samples is None or consumed + self.global_batch_size <= self._max_samples

    def _prepare(self, consumed: int) -> None:
        """Body of the thread: build step after step until closed, or until one fails."""
        while not self._closing.is_set() and self._allows_step(consumed):
            try:
                item: list[Batch] | Exception = self._build_step(consumed)
            except Exception as error:  # handed to the caller of next_step
                item = error
            self._ready.put(item)  # `close` makes room
            if isinstance(item, Exception):
                return
            consumed += self.global_batch_size

    def _build_step(self, consumed: int) -> list[Batch]:
        batches = []
        for micro_batch in range(self.num_micro_batches):
            first = consumed + (micro_batch * self._ranks + self._rank) * self.micro_batch_size
            rows = [self.samples.read(first + j) for j in range(self.micro_batch_size)]
            batches.append(_batch_of(rows, self._document_mask))
        return batches


def _batch_of(samples: list[Sample], document_mask: bool) -> Batch:
    ids = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    size_b, size_s = ids.size(0), ids.size(1) - 1
    mask_bs = np.stack([sample.loss_mask(document_mask) for sample in samples])
    if not document_mask:
        positions_bs = torch.arange(size_s).repeat(size_b, 1)
        cu_seqlens, longest = None, 0
    else:
        positions_bs = torch.from_numpy(np.stack([sample.position_ids() for sample in samples]))
        starts = [row * size_s + sample.document_starts for row, sample in enumerate(samples)]
        bounds = np.concatenate([*starts, [size_b * size_s]])
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
        longest = int(np.diff(bounds).max())
    return Batch(
        tokens_bs=ids[:, :-1].contiguous(),
        labels_bs=ids[:, 1:].contiguous(),
        position_ids_bs=positions_bs,
        loss_mask_bs=torch.from_numpy(mask_bs),
        cu_seqlens=cu_seqlens,
        longest_document_tokens=longest,
        **_chat_fields(samples),
    )


def _chat_fields(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """What a batch of chats has beside that of plain text."""
    chats = [sample for sample in samples if isinstance(sample, ChatSample)]
    if not chats:
        return {}
    rows, before = [], 0
    for chat in chats:
        rows.append(np.where(chat.document_of < 0, -1, chat.document_of + before))
        before += len(chat.documents)
    fields = {"document_of_bs": np.stack(rows)}
    fields["documents"] = np.concatenate([chat.documents for chat in chats])
    logps = [chat.reference_logps for chat in chats if chat.reference_logps is not None]
    if logps:
        fields["reference_logps"] = np.concatenate(logps)
    return {name: torch.from_numpy(values) for name, values in fields.items()}
