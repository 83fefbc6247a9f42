"""Stops cleanly when asked to: finish the step, save, exit with code 3."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from litespark.errors import StoppedBySignal
from litespark.parallel.groups import any_rank
from litespark.training.launch import SIGNALS
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome


class StopOnSignal(Hook):
    """Handles `SIGNALS`: preemption, Ctrl-C, a closed terminal.

    A signal may reach one rank a step before another, so the ranks agree after every step, over
    gloo and on the CPU: a stop that only some ranks believe in would leave the rest waiting.
    """

    def __init__(self, save: Callable[[TrainingRun], None]) -> None:
        self.save = save
        self.received: signal.Signals | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def on_start(self, run: TrainingRun) -> None:
        """Install the handlers, but not for a signal that whoever started this had ignored.

        A shell starts background jobs so that Ctrl-C does not reach them.
        """
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._note)

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Save and stop when any rank has been signalled.

        Raises:
            StoppedBySignal: after the state has been saved.
            LitesparkError: it could not be.
        """
        if not any_rank(self.received is not None):
            return
        self.save(run)
        name = self.received.name if self.received else "a signal on another rank"
        run.record_event("stopped", name)
        raise StoppedBySignal(f"stopped by {name} after step {run.step}; the state is saved")

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
