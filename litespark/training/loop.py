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

    def on_state(self, run: TrainingRun) -> None:
        """Called after all `on_start`, and again whenever a hook has replaced the run's state."""

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Called after each step; `run.step` already counts it."""

    def on_end(self, run: TrainingRun) -> None:
        """Called when all steps are done, not when the run is stopped or fails."""

    def close(self) -> None:
        """Called at last, however the run ends; releases files and threads."""


class StateReplaced(Exception):
    """Raised by a hook's `after_step` that has put the run into another state, at another step."""


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
        _tell_state(run, hooks)
        while run.step < run.total_steps:
            outcome = train_step(run)
            try:
                for hook in hooks:
                    run.progress.enter(type(hook).__name__)
                    hook.after_step(run, outcome)
            except StateReplaced:  # the hooks after it have no step to look at
                _tell_state(run, hooks)
        for hook in hooks:
            run.progress.enter(type(hook).__name__)
            hook.on_end(run)


def _tell_state(run: TrainingRun, hooks: Sequence[Hook]) -> None:
    for hook in hooks:
        hook.on_state(run)
