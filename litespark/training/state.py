"""Everything that lives while a run trains, in one object that hooks and steps receive."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from litespark.checkpoint.sharded import bare_model
from litespark.config.schema import RunConfig
from litespark.data.blend import Blend
from litespark.data.loader import Batch, BatchLoader
from litespark.fp8.policy import PrecisionPolicy
from litespark.metering.meters import RunMeters
from litespark.objectives.language_modelling import ForwardStep
from litespark.parallel.groups import Process
from litespark.parallel.layout import RankLayout
from litespark.training.optimizer import TrainingOptimizer
from litespark.training.step_graph import StepGraph
from litespark.utils.line_log import append_whole

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What this rank is doing; written by the training thread, read by the watchdog's.

    `micro_batch` counts the forward passes of the step from 1; `changes` counts all changes;
    while `is_suspended` a lack of changes is no sign of a hang.
    """

    step: int = 0
    micro_batch: int = 0
    phase: str = "starting"
    changes: int = 0
    is_suspended: bool = False

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Begin another phase, and with `step` another step."""
        if step is not None:
            self.step, self.micro_batch = step, 0
        self.phase = phase
        self.changes += 1

    def next_micro_batch(self) -> None:
        """Begin another forward pass."""
        self.micro_batch += 1
        self.changes += 1

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The block waits for a disk, which takes as long as it takes."""
        self.is_suspended = True
        try:
            yield
        finally:
            self.changes += 1
            self.is_suspended = False


class ForwardClock:
    """Time of this rank's own forward passes, in which it waits for tensor parallelism at most.

    On a GPU events are recorded, and read when they have passed: nothing waits for them.
    """

    def __init__(self, device_type: str) -> None:
        self.on_gpu = device_type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """The block is one forward pass."""
        begin = self._now()
        yield
        self.spans.append((begin, self._now()))

    def take_mean_seconds(self) -> float | None:
        """Mean since the last call, of passes that are over; None if there were none."""
        spans, self.spans = self.spans, []
        if not spans:
            return None
        if not self.on_gpu:
            return sum(end - begin for begin, end in spans) / len(spans)
        spans[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / len(spans) / 1e3

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Timings:
    """Seconds spent since the last line of metrics, and what else is counted since.

    With document masks `squared_document_tokens` is the sum of the squares of the lengths of this
    rank's documents, which attention's work grows with.
    """

    steps_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    squared_document_tokens: float = 0.0


# Why a step's update must not be made, None if it may: from the gradients' norm and, as in
# `StepOutcome`, losses and tokens, and the micro-batches.  All ranks are asked and find the same.
Judge = Callable[[float, Tensor, Sequence[Batch | None]], str | None]


@dataclass
class TrainingRun:
    """A run in progress on this rank.

    `train_batches` is None on pipeline stages that read no tokens; `step` and `consumed_samples`
    count over the whole run, resumed parts included; `judges` are asked before each update;
    `metrics` names what is reported beside the loss; `attach_reference` completes the micro-batches
    of a step with what a reference model says of them, where there is one; `progress` says what
    this rank is doing, `forward_clock` how long its forward passes take; `folder_lock` is held by
    the first rank; `has_trained` says that this process has made a step; `step_graph` records the
    passes of a step, where that is asked for.
    """

    config: RunConfig
    process: Process
    layout: RankLayout
    core_config: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: TrainingOptimizer
    forward_step: ForwardStep
    train_batches: BatchLoader | None
    validation: Blend | None
    reads_tokens: bool
    step: int = 0
    consumed_samples: int = 0
    has_trained: bool = False
    folder_lock: TextIO | None = None
    timings: Timings = field(default_factory=Timings)
    progress: Progress = field(default_factory=Progress)
    forward_clock: ForwardClock = field(init=False)
    judges: list[Judge] = field(default_factory=list)
    metrics: tuple[str, ...] = ()
    attach_reference: Callable[[Sequence[Batch]], Sequence[Batch]] | None = None
    meters: RunMeters = field(default_factory=RunMeters)
    step_graph: StepGraph | None = None

    def __post_init__(self) -> None:
        self.forward_clock = ForwardClock(self.process.device.type)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.total_steps

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.output_dir)

    @property
    def policy(self) -> PrecisionPolicy:
        """The number formats of this rank's layers, and their scales."""
        return bare_model(self.chunks[0]).policy

    def close(self) -> None:
        """End the loader's threads, and give up the recorded step, which its communicators' end
        would wait for.
        """
        if self.train_batches is not None:
            self.train_batches.close()
        if self.step_graph is not None:
            self.process.device.synchronize()
            self.step_graph.forget()

    def record_event(self, event: str, detail: str, step: int | None = None) -> None:
        """Append a line to the run's `events.jsonl`; only the first rank writes.

        `step` is the run's, unless something tells of an earlier one.
        """
        if self.process.is_first:
            self.append_event(event, detail, step)

    def append_event(
        self, event: str, detail: str | dict[str, Any], step: int | None = None
    ) -> None:
        """The same from whichever rank calls it, when one speaks that need not be the first."""
        line: dict[str, Any] = {
            "time": time.time(),
            "step": self.step if step is None else step,
            "event": event,
            "detail": detail,
        }
        path = self.folder / "events.jsonl"
        try:
            with open(path, "ab", buffering=0) as file:
                append_whole(file, json.dumps(line).encode() + b"\n")
        except OSError as error:  # the disk is full, say; it is often what the event is about
            logger.warning("%s cannot be written (%s): %s: %s", path, error.strerror, event, detail)
