"""Power, polled and integrated: a second opinion on what the energy counter says.

The driver's power is an average over its own window (about a second on Hopper, of which a sensor
sees a part only: Yang et al. 2023, arXiv 2312.02741), so that an integral of it lags behind at both
ends and misses what happens in between.  How far the sum may be off from that alone is bounded by
half of the jumps between neighbouring samples; a wrong sensor would be in both opinions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_SECONDS = 0.1


@dataclass(frozen=True)
class PowerIntegral:
    """Joules over `seconds`, from `samples` readings; `uncertainty_joules` either way."""

    joules: float
    uncertainty_joules: float
    seconds: float
    samples: int


def integrate(times: list[float], watts: list[float]) -> PowerIntegral | None:
    """The trapezoid sum of samples in order; None from fewer than two."""
    if len(times) < 2:
        return None
    joules = doubt = 0.0
    for index in range(1, len(times)):
        seconds = times[index] - times[index - 1]
        joules += seconds * (watts[index] + watts[index - 1]) / 2
        doubt += seconds * abs(watts[index] - watts[index - 1]) / 2
    return PowerIntegral(joules, doubt, times[-1] - times[0], len(times))


class PowerPoller:
    """Reads power in a thread of its own between `start` and `stop`.

    A reading of None ends it, and there is no integral then: a part of a sum is no sum.

    Args:
        read_watts: the sensor.
        interval_seconds: between readings.
    """

    def __init__(
        self, read_watts: Callable[[], float | None], interval_seconds: float = INTERVAL_SECONDS
    ) -> None:
        self._read_watts = read_watts
        self._interval_seconds = interval_seconds
        self._times: list[float] = []
        self._watts: list[float] = []
        self._has_failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="power", daemon=True)

    def start(self) -> None:
        """Take the first sample and go on."""
        self._sample()
        self._thread.start()

    def stop(self) -> PowerIntegral | None:
        """Take the last sample; the integral, or None where power cannot be read."""
        self._stop.set()
        self._thread.join()
        self._sample()
        return None if self._has_failed else integrate(self._times, self._watts)

    def _poll(self) -> None:
        while not self._has_failed and not self._stop.wait(self._interval_seconds):
            self._sample()

    def _sample(self) -> None:
        watts = None if self._has_failed else self._read_watts()
        if watts is None:
            self._has_failed = True
            return
        self._times.append(time.perf_counter())
        self._watts.append(watts)
