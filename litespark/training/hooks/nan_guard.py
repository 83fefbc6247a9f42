"""Ends a run whose loss or gradients are no longer finite, before more state is overwritten."""

from __future__ import annotations

import math

from litespark.errors import GuardError
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome


class NanGuard(Hook):
    """Watches the global gradient norm: a NaN or Inf in any loss or gradient makes it not finite.

    The norm is the same number on all ranks and has been read by clipping already, so the guard
    costs neither a collective nor a wait for the GPU.
    """

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Stop the run.

        Raises:
            GuardError: the gradient norm is NaN or infinite.
        """
        if not math.isfinite(outcome.grad_norm):
            raise GuardError(
                f"step {run.step}: the gradient norm is {outcome.grad_norm}; the run ends before "
                "this state is saved. Start again from the last checkpoint with a lower "
                "optimizer.lr, or set resilience.stop_on_nan=false to go on regardless"
            )
