"""Looks for silent corruption: computes the losses of a step again and compares them, bit for bit.

A GPU or a memory that flips bits shows in nothing but a model that is worse than it should be.
The same weights and the same micro-batches must give the same losses, and what is off in any layer
before the loss shows there.  The backward pass is not repeated: attention adds its gradients in any
order, so that they differ from run to run.

Which of the three it is, is told as in megatron-core's rerun state machine: a difference that does
not come back is a fault of this moment; results that keep differing mean that the computation is
not deterministic here, and checking says nothing.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

import torch
from torch import Tensor

from litespark.data.loader import Batch
from litespark.errors import GuardError
from litespark.parallel.groups import any_rank, gather_objects
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import run_schedule

logger = logging.getLogger("litespark.training")


class Recheck(Hook):
    """Every `resilience.recheck_every` steps, before the update."""

    def on_start(self, run: TrainingRun) -> None:
        """Become a judge of the run."""
        self.every = run.config.resilience.recheck_every
        if self.every is not None:
            run.judges.append(lambda _, losses, batches: self._judge(run, losses, batches))

    def _judge(
        self, run: TrainingRun, first: Tensor, micro_batches: Sequence[Batch | None]
    ) -> None:
        """Compare; all ranks call it together.

        Raises:
            GuardError: a rank found other losses than it had the first time, and then the same.
        """
        if self.every is None or (run.step + 1) % self.every:
            return
        second = _again(run, micro_batches)
        differs = not torch.equal(first, second)
        if not any_rank(differs):
            return
        third = _again(run, micro_batches)
        if any_rank(not torch.equal(second, third)):
            self.every = None
            text = (
                "the losses differ each time that they are computed, so the computation is not "
                "deterministic here; resilience.recheck_every is ignored"
            )
            run.record_event("not_rechecked", text)
            if run.process.is_first:
                logger.warning("step %d: %s", run.step + 1, text)
            return
        found = (first[0].item(), second[0].item(), socket.gethostname()) if differs else None
        faults = [
            f"rank {rank} on {fault[2]} ({fault[0]!r}, then twice {fault[1]!r})"
            for rank, fault in enumerate(gather_objects(found))
            if fault is not None
        ]
        raise GuardError(
            f"step {run.step + 1}: the same weights and batch gave other losses when computed "
            f"again: {', '.join(faults)}. Memory or arithmetic of these ranks, or of those before "
            "them in the pipeline, is faulty; take the machine out and start again"
        )


@torch.enable_grad()  # the kernels of training, which are not those of evaluation
def _again(run: TrainingRun, micro_batches: Sequence[Batch | None]) -> Tensor:
    # The weights were gathered for this step.  A hook that did so again would take the next step's
    # weights for gathered as well.
    overlapped = [chunk for chunk in run.chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        with run.policy.unrecorded():
            return run_schedule(run, micro_batches, forward_only=True)
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
