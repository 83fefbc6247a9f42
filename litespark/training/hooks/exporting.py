"""Hugging Face folders of a run's checkpoints, written while training goes on.

The first rank starts `litespark export` in a process of its own once a checkpoint has its name, and
training waits for nothing.  The process reads a copy of the checkpoint that costs no space (hard
links), so that the checkpoint may be pruned meanwhile; where there are no links it reads the
checkpoint itself.  One export runs at a time: the next one waits in the process's place.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from litespark.checkpoint.folder import step_of
from litespark.parallel.groups import gather_objects
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome

FOLDER = "hf"
_SOURCE = ".exporting_"
_POLL_SECONDS = 0.5
# What tells a process that it is a rank, or to use the GPUs that training needs.
_NOT_INHERITED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
logger = logging.getLogger("litespark.hf")


@dataclass
class _Export:
    step: int
    source: Path
    out: Path
    log: Path
    process: subprocess.Popen[bytes]


class Exporting(Hook):
    """Every `checkpoint.export_hf_every` steps, into `<output_dir>/hf/step_...`.

    `saved` is told of each checkpoint that has its name, from whichever thread.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.every = run.config.checkpoint.export_hf_every
        self.waiting: list[Path] = []
        self.current: _Export | None = None

    def saved(self, checkpoint: Path) -> None:
        """Take note of a checkpoint that is complete; only the first rank has one to export."""
        step = step_of(checkpoint)
        is_due = self.every is not None and step % self.every == 0
        if is_due and not (self.run.folder / FOLDER / checkpoint.name).exists():
            self.waiting.append(_linked_copy(checkpoint, self.run.folder / FOLDER))

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Start what waits, if nothing runs; costs a look at a process."""
        self._go_on()

    def on_end(self, run: TrainingRun) -> None:
        """Let all that was saved be exported: nothing else would.

        The other ranks wait as well, a second at a time: a rank that leaves, or that sits in one
        collective until its time-out, would look like a fault.
        """
        if self.every is None:
            return
        with run.progress.suspended():
            self._go_on()
            while gather_objects(self.current is not None)[0]:
                time.sleep(_POLL_SECONDS)
                self._go_on()

    def close(self) -> None:
        """End an export under way: a run that was stopped has no time for it."""
        if self.current is not None:
            self.current.process.terminate()
            self.current.process.wait()
            self._tell()
        for source in self.waiting:
            _remove_copy(source)

    def _go_on(self) -> None:
        if self.current is not None:
            if self.current.process.poll() is None:
                return
            self._tell()
        if self.waiting:
            self.current = self._start(self.waiting.pop(0))

    def _start(self, source: Path) -> _Export:
        name = source.name.removeprefix(_SOURCE)
        out = self.run.folder / FOLDER / name
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)  # of a killed run
        log = out.with_name(f"{name}.log")
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "litespark", "export", str(source), str(out)]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [*command, "--no-verify"],  # it was written a moment ago
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        with suppress(OSError, AttributeError):  # training goes first
            os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        return _Export(step_of(out), source, out, log, process)

    def _tell(self) -> None:
        """How the export ended; its copy of the checkpoint goes."""
        export, self.current = self.current, None
        assert export is not None, "one has ended"
        _remove_copy(export.source)
        if export.process.returncode == 0:
            export.log.unlink(missing_ok=True)
            logger.info("exported step %d to %s", export.step, export.out)
            self.run.record_event("exported", export.out.name, export.step)
            return
        logger.error(
            "the export of step %d failed (exit code %d), see %s; training goes on",
            *(export.step, export.process.returncode, export.log),
        )
        self.run.record_event("export_failed", str(export.log), export.step)


def _linked_copy(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint under another name, its files shared; itself where there are no links."""
    copy = folder / f"{_SOURCE}{checkpoint.name}"
    shutil.rmtree(copy, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint, copy, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(copy, ignore_errors=True)
        return checkpoint
    return copy


def _remove_copy(source: Path) -> None:
    if source.name.startswith(_SOURCE):
        shutil.rmtree(source, ignore_errors=True)
