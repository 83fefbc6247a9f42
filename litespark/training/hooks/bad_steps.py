"""Keeps a bad batch, or a run that goes astray, out of the weights.

A step is bad when the gradients' norm is not finite (a NaN or Inf in any loss or gradient makes it
so), or when its loss is far above that of the steps before (`resilience.spike_factor`).  The update
of a bad step is not made: weights, moments and their count stay as they were, the batch counts as
consumed, and it is written to the run's folder.  After `resilience.bad_steps_in_a_row` of them the
run ends, or goes back to its last checkpoint and on with the data after the bad ones, as PaLM's
did (Chowdhery et al. 2022, section 5.1).
"""

from __future__ import annotations

import logging
import math
from collections import deque

import torch
from safetensors.torch import save
from torch import Tensor

from litespark.errors import GuardError
from litespark.training.hooks.checkpointing import Checkpointing
from litespark.training.loop import Hook, StateReplaced
from litespark.training.setup import go_back
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome, mean_loss
from litespark.utils.files import atomic_write

logger = logging.getLogger("litespark.training")

FOLDER = "bad_steps"
_MOST_WRITTEN = 100  # batches; a run that goes on and on must not fill the disk


class BadSteps(Hook):
    """Judges each step before its update, and acts on those that it refused.

    The norm is the same number on all ranks and is computed for clipping already, so watching it
    costs no collective; watching the loss costs one of two numbers a step.
    """

    def __init__(self, checkpointing: Checkpointing) -> None:
        self.checkpointing = checkpointing
        self.in_a_row = 0
        self.written = 0
        self.times_gone_back = 0
        self.good_losses: deque[float] = deque()

    def on_start(self, run: TrainingRun) -> None:
        """Become a judge of the run."""
        self.good_losses = deque(maxlen=run.config.resilience.spike_window)
        run.judges.append(lambda norm, losses, _: self._judge(run, norm, losses))

    def on_state(self, run: TrainingRun) -> None:
        """Forget the losses of the state that was left."""
        self.in_a_row = 0
        self.good_losses.clear()

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Write down a refused step; end or go back after too many.

        Raises:
            GuardError: too many in a row.
            StateReplaced: the run went back to a checkpoint.
        """
        if outcome.refused is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self._keep(run, outcome)
        limit = run.config.resilience.bad_steps_in_a_row
        text = f"step {run.step}: {outcome.refused}"
        run.record_event("bad_step", outcome.refused)
        if self.in_a_row < limit:
            if run.process.is_first:
                logger.warning("%s; not applied, %d in a row of %d", text, self.in_a_row, limit)
            return
        self._end_or_go_back(run, text)

    def _judge(self, run: TrainingRun, norm: float, loss_and_tokens: Tensor) -> str | None:
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        factor = run.config.resilience.spike_factor
        if factor is None:
            return None
        loss = mean_loss(loss_and_tokens)
        if len(self.good_losses) == self.good_losses.maxlen:
            mean = sum(self.good_losses) / len(self.good_losses)
            if not loss <= factor * mean:
                return (
                    f"the loss is {loss:.4g}, more than {factor:g} times the mean of the last "
                    f"{len(self.good_losses)} good steps, {mean:.4g}"
                )
        self.good_losses.append(loss)
        return None

    def _keep(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Write this rank's micro-batches, where it is the one of its replica that has them."""
        place = run.layout.coordinates(run.process.rank)
        batches = [batch for batch in outcome.micro_batches if batch is not None]
        speaks = place.tensor == place.context == place.pipeline == 0
        if not batches or not speaks or self.written >= _MOST_WRITTEN:
            return
        self.written += 1
        path = run.folder / FOLDER / f"step_{run.step:09d}_data_{place.data}.safetensors"
        tensors = {
            name: torch.stack([getattr(batch, name) for batch in batches])
            for name in ("tokens_bs", "labels_bs", "loss_mask_bs")
        }
        about = {
            "reason": outcome.refused or "",
            "step": str(run.step),
            "grad_norm": str(outcome.grad_norm),
            "first_sample_of_the_step": str(run.consumed_samples - run.config.batch.global_),
        }
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as file:
                file.write(save(tensors, metadata=about))
        except OSError as error:  # a full disk is no reason to stop
            logger.warning("the batch of step %d could not be written: %s", run.step, error)

    def _end_or_go_back(self, run: TrainingRun, text: str) -> None:
        resilience = run.config.resilience
        count = f"{self.in_a_row} bad steps in a row" if self.in_a_row > 1 else "a bad step"
        kept = f"its batch is in {run.folder / FOLDER}"
        if resilience.after_bad_steps == "stop":
            raise GuardError(
                f"{text}; {count}, none was applied; {kept}. Start again with a lower optimizer.lr "
                "or with resilience.after_bad_steps=roll_back"
            )
        if self.times_gone_back >= resilience.max_roll_backs:
            raise GuardError(
                f"{text}; {count} after {self.times_gone_back} roll-backs "
                f"(resilience.max_roll_backs); {kept}"
            )
        found = self.checkpointing.newest(run)
        if found is None:
            raise GuardError(f"{text}; {count}, and there is no checkpoint to go back to; {kept}")
        self.times_gone_back += 1
        go_back(run, found)
        run.record_event("rolled_back", f"{text}; {found.name}, data from {run.consumed_samples}")
        if run.process.is_first:
            logger.warning(
                "%s; %s: back to %s, and on with sample %d",
                *(text, count, found.name, run.consumed_samples),
            )
        raise StateReplaced
