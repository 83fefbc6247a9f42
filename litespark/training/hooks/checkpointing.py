"""Saves the run's state at intervals and at the end, while training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from litespark.checkpoint.choose import newest_whole
from litespark.checkpoint.folder import (
    newest_checkpoint,
    newest_first,
    remove_leftovers,
    set_aside_later,
)
from litespark.checkpoint.mirror import Mirror, SendOutcome
from litespark.checkpoint.optimizer_state import optimizer_step
from litespark.checkpoint.run_state import RunState
from litespark.checkpoint.save import CheckpointSaver, SaveFailed, SaveOutcome, written
from litespark.config.load import dump_config
from litespark.parallel.groups import gather_objects
from litespark.training.launch import GRACE_SECONDS
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome, parameters_synchronised

logger = logging.getLogger("litespark.checkpoint")


class Checkpointing(Hook):
    """Every `training.save_every` steps and after the last one.

    A save that fails (the disk is full, the destination is gone) does not end the run: that is
    said, the older checkpoints stay, and the next save tries again.  Only the last one must
    succeed, because nothing comes after it.  `on_saved` is told of each checkpoint that is
    complete, on the first rank and from the background's thread.
    """

    def __init__(self, on_saved: Callable[[Path], None] = lambda checkpoint: None) -> None:
        self.on_saved = on_saved
        self.saved_step = -1
        self.saver: CheckpointSaver | None = None
        self.mirror: Mirror | None = None

    def on_start(self, run: TrainingRun) -> None:
        """Make the mirror, if the run has one."""
        options = run.config.checkpoint
        if options.mirror is not None and run.process.is_first:
            self.mirror = Mirror(options, lambda outcome: _report_sending(run, outcome))

    def on_state(self, run: TrainingRun) -> None:
        """Remember what is on disk already, so that it is not written twice; tidy up."""
        self.saved_step = run.step
        if run.process.is_first:
            checkpoints = run.folder / "checkpoints"
            remove_leftovers(checkpoints)
            for path in set_aside_later(checkpoints, run.step):
                logger.warning("resumed at step %d: %s is set aside", run.step, path.name)
            newest = newest_checkpoint(checkpoints)
            if self.mirror is not None and newest is not None:
                self.mirror.offer(newest)  # a kill may have come before it was sent

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Save when it is time; after the first step, make ready for it."""
        if self.saver is None:
            self._saver(run).prepare(run.chunks, run.optimizer)
        every = run.config.training.save_every
        if every is not None and run.step % every == 0:
            self.save(run)

    def on_end(self, run: TrainingRun) -> None:
        """Save the final state and wait for it, also for its copy in the mirror.

        Raises:
            LitesparkError: it could not be written, or not sent.
        """
        self.save_now(run)
        if run.config.checkpoint.mirror is None:
            return
        with run.progress.suspended():
            sent = self.mirror.wait() if self.mirror is not None else None
        sent = self._saver(run).from_first_rank(sent)
        if sent is not None and sent.problem:
            raise SaveFailed(
                f"step {sent.step} is saved in {run.folder}, but could not be sent to {sent.place}:"
                f" {sent.problem}"
            )

    def close(self) -> None:
        """Give a save in flight the time to end; a rank that died would keep it for ever."""
        started = time.monotonic()
        if self.saver is not None:
            self.saver.wait(GRACE_SECONDS)
        if self.mirror is not None:
            self.mirror.wait(GRACE_SECONDS - (time.monotonic() - started))
            for name in self.mirror.needed():
                logger.error("%s is not in %s: there was no time", name, self.mirror.place)

    def newest(self, run: TrainingRun) -> Path | None:
        """The checkpoint that a restart would begin with; all ranks call it together.

        A save under way is waited for, and every byte of what is found has been compared with its
        checksum.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        if self.saver is not None:
            self.saver.wait()
        with run.progress.suspended():
            candidates = newest_first(run.folder / "checkpoints")
            return newest_whole(candidates, verify=run.config.checkpoint.verify)

    def save(self, run: TrainingRun) -> None:
        """Start to save this step, unless that is done; all ranks call it together."""
        if self.saved_step == run.step:
            return
        started = time.perf_counter()
        state = RunState.of(
            run.config,
            run.layout,
            step=run.step,
            consumed_samples=run.consumed_samples,
            optimizer_step=max(gather_objects(optimizer_step(run.optimizer))),
            fp8_scales=_fp8_scales(run),
            bf16_layers=sorted(run.policy.moved_layers),
        )
        saver, report = self._saver(run), _Report(run, self.mirror, self.on_saved)
        with run.meters.within("checkpoint"), parameters_synchronised(run.chunks):
            saver.save(run.chunks, run.optimizer, state, dump_config(run.config), report)
        self.saved_step = run.step
        report.waited_seconds = time.perf_counter() - started
        run.timings.checkpoint_seconds += report.waited_seconds

    def save_now(self, run: TrainingRun) -> None:
        """Save this step, unless that is done, and wait until it is on disk.

        Raises:
            LitesparkError: it could not be written.
        """
        self.save(run)
        if self.saver is None:
            return
        started = time.perf_counter()
        with run.meters.within("checkpoint"):
            outcome = self.saver.wait()
        run.timings.checkpoint_seconds += time.perf_counter() - started
        if outcome is not None:
            written(outcome)

    def _saver(self, run: TrainingRun) -> CheckpointSaver:
        if self.saver is None:
            folder, options = run.folder / "checkpoints", run.config.checkpoint
            needed = self.mirror.needed if self.mirror is not None else tuple
            self.saver = CheckpointSaver(folder, options, run.progress.suspended, needed)
        return self.saver


@dataclass
class _Report:
    """Tells the user how a save ended; called from the background's thread."""

    run: TrainingRun
    mirror: Mirror | None
    on_saved: Callable[[Path], None]
    waited_seconds: float | None = None

    def __call__(self, outcome: SaveOutcome) -> None:
        run = self.run
        if not run.process.is_first:
            return
        if outcome.checkpoint is None:
            if outcome.step < run.total_steps:  # else the run ends, and with this problem
                logger.error(
                    "the state of step %d could not be saved (%s); training goes on, older "
                    "checkpoints stay, the next save tries again",
                    *(outcome.step, outcome.problem),
                )
            run.record_event("checkpoint_failed", outcome.problem, outcome.step)
            return
        waited = self.waited_seconds
        logger.info(
            "saved %s: %.2f GB in %.1f s%s",
            *(outcome.checkpoint.name, outcome.num_bytes / 1e9, outcome.seconds),
            "" if waited is None else f", for which training waited {waited:.2f} s",
        )
        run.record_event("checkpoint", outcome.checkpoint.name, outcome.step)
        if self.mirror is not None:
            self.mirror.offer(outcome.checkpoint)
        self.on_saved(outcome.checkpoint)


def _report_sending(run: TrainingRun, outcome: SendOutcome) -> None:
    """Tell the user how the copying to the mirror ended; called from its thread."""
    if outcome.problem:
        logger.error(
            "step %d could not be sent to %s (%s); it is saved on this machine, training goes on, "
            "the next checkpoint is sent",
            *(outcome.step, outcome.place, outcome.problem),
        )
        run.record_event("mirror_failed", outcome.problem, outcome.step)
    elif outcome.num_bytes:
        logger.info(
            "sent %s: %.2f GB in %.1f s",
            *(outcome.place, outcome.num_bytes / 1e9, outcome.seconds),
        )
        run.record_event("mirrored", outcome.place, outcome.step)


def _fp8_scales(run: TrainingRun) -> dict[str, list[float]]:
    """The FP8 scales of all pipeline stages; ranks beside each other have the same."""
    if run.config.precision.mode != "fp8":
        return {}
    place = run.layout.coordinates(run.process.rank)
    speaks = place.tensor == place.context == place.data == 0
    parts = gather_objects(run.policy.state() if speaks else {})
    return {name: values for part in parts for name, values in part.items()}
