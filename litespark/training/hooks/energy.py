"""The energy of the whole run, said once at its end: after the last evaluation and checkpoint."""

from __future__ import annotations

import logging
from typing import Any

from litespark.metering.meters import HOST_KEY, PHASE_KEYS
from litespark.metering.power import PowerIntegral
from litespark.parallel.groups import gather_objects
from litespark.training.hooks.console import energy
from litespark.training.hooks.metrics import StepMetrics
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun

logger = logging.getLogger("litespark.metering")

_JOULES_PER_KILOWATT_HOUR = 3.6e6


class EnergyTotals(Hook):
    """An event `energy` with the joules of this start of the run, by what they were used for.

    It holds besides what came after the last line of metrics, so that a report misses nothing.
    """

    def __init__(self, metrics: StepMetrics) -> None:
        self.metrics = metrics

    def on_end(self, run: TrainingRun) -> None:
        """Sum over the ranks and tell."""
        run.meters.enter("idle")
        tail = self.metrics.take_joules(run).joules
        totals = self.metrics.totals
        detail: dict[str, Any] = {"tail": tail, **totals}
        detail |= energy_record(totals, run.config.metering.grid_grams_per_kwh)
        if run.meters.poller is not None:
            integrals = gather_objects(run.meters.poller.stop())
            detail["integrated"] = _sum_of_integrals(integrals)
        if not run.process.is_first:
            return
        run.append_event("energy", detail)
        if detail["gpu_joules"] is not None:
            logger.info("energy of the GPUs: %s", energy(detail["gpu_joules"]))


def energy_record(totals: dict[str, float | None], grid_grams_per_kwh: float | None) -> Any:
    """Sum of the GPUs' phases, kWh with the host's where known, and kg CO2e with a grid's factor.

    A sum of which a part was not measured is null.
    """
    phases = [totals[key] for key in PHASE_KEYS.values()]
    joules = None if None in phases else sum(value for value in phases if value is not None)
    if joules is None:
        return {"gpu_joules": None, "kwh": None, "kg_co2e": None}
    kwh = (joules + (totals[HOST_KEY] or 0.0)) / _JOULES_PER_KILOWATT_HOUR
    grams = grid_grams_per_kwh
    return {
        "gpu_joules": joules,
        "kwh": kwh,
        "kg_co2e": None if grams is None else kwh * grams / 1000,
    }


def _sum_of_integrals(integrals: list[PowerIntegral | None]) -> dict[str, float] | None:
    known = [each for each in integrals if each is not None]
    if not known or len(known) < len(integrals):
        return None
    return {
        "joules": sum(each.joules for each in known),
        "uncertainty_joules": sum(each.uncertainty_joules for each in known),
        "seconds": max(each.seconds for each in known),
    }
