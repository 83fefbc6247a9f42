"""Joules of a step: the power that a computing GPU draws, and that of one that waits.

Hopper runs these steps at its power cap whatever the shape, so that one figure a number format,
from the measured steps of the calibration, says nearly all.  A GPU that waits for others runs their
collectives' kernels; one that waits for its host runs none.
"""

from __future__ import annotations

from litespark.config.schema import RunConfig
from litespark.metering.plan.calibration import Calibration
from litespark.metering.plan.time import StepTime

JOULES_PER_KILOWATT_HOUR = 3.6e6


def step_joules(config: RunConfig, step: StepTime, calibration: Calibration) -> float:
    """Energy of one GPU over one step."""
    watts = calibration.busy_watts
    busy = watts.get(config.precision.mode, max(watts.values()))
    computing = step.total - step.waiting
    waiting = min(busy, calibration.waiting_watts)
    idle = min(waiting, calibration.idle_watts or waiting)
    return busy * computing + waiting * (step.waiting - step.host) + idle * step.host
