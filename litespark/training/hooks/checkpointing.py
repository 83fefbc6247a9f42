"""Saves the run's state at intervals and at the end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from litespark.checkpoint.folder import (
    newest_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    set_aside_later,
)
from litespark.checkpoint.run_state import RunState
from litespark.checkpoint.save import save_checkpoint
from litespark.config.load import dump_config
from litespark.parallel.groups import gather_objects
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome, parameters_synchronised

logger = logging.getLogger("litespark.checkpoint")


class Checkpointing(Hook):
    """Every `training.save_every` steps and after the last one."""

    def __init__(self) -> None:
        self.saved_step = -1

    def on_state(self, run: TrainingRun) -> None:
        """Remember what is on disk already, so that it is not written twice; tidy up."""
        self.saved_step = run.step
        if run.process.is_first:
            remove_leftovers(run.folder / "checkpoints")
            for path in set_aside_later(run.folder / "checkpoints", run.step):
                logger.warning("rolled back to step %d: %s is set aside", run.step, path.name)

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Save when it is time."""
        every = run.config.training.save_every
        if every is not None and run.step % every == 0:
            self.save(run)

    def on_end(self, run: TrainingRun) -> None:
        """Save the final state."""
        self.save(run)

    def newest(self, run: TrainingRun) -> Path | None:
        """The checkpoint that a restart would begin with; all ranks call it together."""
        return gather_objects(newest_checkpoint(run.folder / "checkpoints"))[0]

    def save(self, run: TrainingRun) -> None:
        """Write a checkpoint of this step, unless there is one; all ranks call it together."""
        if self.saved_step == run.step:
            return
        started = time.perf_counter()
        state = RunState.of(
            run.config,
            run.layout,
            step=run.step,
            consumed_samples=run.consumed_samples,
            fp8_scales=_fp8_scales(run),
            bf16_layers=sorted(run.policy.moved_layers),
        )
        checkpoints = run.folder / "checkpoints"
        with parameters_synchronised(run.chunks):
            folder = save_checkpoint(
                checkpoints, run.chunks, run.optimizer, state, dump_config(run.config)
            )
        keep = run.config.checkpoint.keep_last
        if keep is not None and run.process.is_first:
            prune_checkpoints(checkpoints, keep)
        self.saved_step = run.step
        run.timings.checkpoint_seconds += time.perf_counter() - started
        run.record_event("checkpoint", folder.name)


def _fp8_scales(run: TrainingRun) -> dict[str, list[float]]:
    """The delayed scales of all pipeline stages; ranks beside each other have the same."""
    if run.config.precision.mode != "fp8":
        return {}
    place = run.layout.coordinates(run.process.rank)
    speaks = place.tensor == place.context == place.data == 0
    parts = gather_objects(run.policy.state() if speaks else {})
    return {name: values for part in parts for name, values in part.items()}
