"""The training loop.  Features are hooks, one file each; none is named here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome, train_step


class Hook:
    """Something that happens around steps; all ranks call every method, in the hooks' order."""

    def on_start(self, run: TrainingRun) -> None:
        """Called once before the first step, after the state was loaded."""

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Called after each step; `run.step` already counts it."""

    def on_end(self, run: TrainingRun) -> None:
        """Called when all steps are done, not when the run is stopped or fails."""

    def close(self) -> None:
        """Called at last, however the run ends; releases files and threads."""


def train(run: TrainingRun, hooks: Sequence[Hook]) -> None:
    """Train until `run.total_steps`.

    Raises:
        StoppedBySignal, GuardError: a hook ended the run.
    """
    with ExitStack() as at_last:
        for hook in hooks:
            at_last.callback(hook.close)  # each is closed, also when closing another fails
        for hook in hooks:
            hook.on_start(run)
        while run.step < run.total_steps:
            outcome = train_step(run)
            for hook in hooks:
                hook.after_step(run, outcome)
        for hook in hooks:
            hook.on_end(run)
