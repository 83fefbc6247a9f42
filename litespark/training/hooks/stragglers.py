"""Compares how long the ranks compute, and names the one that holds the others up.

All ranks finish a step together, whoever was slow, so a step's time names nobody.  The forward
passes alone are a rank's own: it waits in them for its tensor-parallel group at most.  Pipeline
stages differ in what they compute, so a rank is compared with its own stage.
"""

from __future__ import annotations

import logging
import socket
from statistics import median

from litespark.parallel.groups import gather_objects
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome

logger = logging.getLogger("litespark.training")


class Stragglers(Hook):
    """Every `resilience.straggler_every` steps, where there is more than one rank."""

    def on_state(self, run: TrainingRun) -> None:
        """Begin to count."""
        run.forward_clock.take_mean_seconds()

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Compare when it is time."""
        every = run.config.resilience.straggler_every
        if every is None or run.step % every:
            return
        seconds = run.forward_clock.take_mean_seconds()
        stage = run.layout.coordinates(run.process.rank).pipeline
        if run.process.world_size == 1:
            return
        ranks = gather_objects((stage, socket.gethostname(), seconds))
        # Passes that are replayed (`step_graph.py`) tell no time.
        if run.process.is_first and all(seconds is not None for _, _, seconds in ranks):
            self._compare(run, ranks)

    def _compare(self, run: TrainingRun, ranks: list[tuple[int, str, float]]) -> None:
        medians = {
            stage: median(seconds for other, _, seconds in ranks if other == stage)
            for stage, _, _ in ranks
        }
        ratios = [seconds / medians[stage] for stage, _, seconds in ranks]
        slowest = max(range(len(ranks)), key=lambda rank: ratios[rank])
        stage, host, seconds = ranks[slowest]
        text = (
            f"forward pass of a micro-batch: slowest rank {slowest} on {host}, "
            f"{1e3 * seconds:.1f} ms; median of its stage {1e3 * medians[stage]:.1f} ms"
        )
        if ratios[slowest] < run.config.resilience.straggler_ratio:
            logger.info("step %d: %s", run.step, text)
            return
        logger.warning("step %d: a straggler: %s", run.step, text)
        run.record_event("straggler", text)
