"""Whose energy it was: a run's joules by what the GPU was used for.

Counters only go up, so the energy of a phase is the difference between its ends: two readings of
some microseconds where a phase begins and ends, and none within a step.  The GPU works behind the
host, and the driver brings its counter up to date about ten times a second, so that a boundary is
true to some tenth of a second; what is misplaced there is not lost but in the neighbouring phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["training", "evaluation", "checkpoint", "idle"]
PHASES: tuple[Phase, ...] = ("training", "evaluation", "checkpoint", "idle")


class EnergyLedger:
    """Joules of one counter by phase, since the last time they were taken.

    A counter that fails makes all phases None from then on: a part of a sum is no sum.

    Args:
        read_joules: the counter; None from it means that it cannot be read.
        phase: what goes on to begin with.
    """

    def __init__(self, read_joules: Callable[[], float | None], phase: Phase = "idle") -> None:
        self._read_joules = read_joules
        self._phase: Phase = phase
        self._joules: dict[Phase, float] | None = dict.fromkeys(PHASES, 0.0)
        self._last = read_joules()

    def enter(self, phase: Phase) -> None:
        """What has been used until now belongs to the phase before."""
        self._settle()
        self._phase = phase

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """The block is of this phase; then the one before goes on."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def take(self) -> dict[Phase, float] | None:
        """Joules by phase since the last call; None: not measured in all of that time."""
        self._settle()
        if self._joules is None:
            return None
        taken, self._joules = self._joules, dict.fromkeys(PHASES, 0.0)
        return taken

    def _settle(self) -> None:
        now = self._read_joules()
        if now is None or self._last is None:
            self._joules = None
        elif self._joules is not None:
            self._joules[self._phase] += now - self._last
        self._last = now
