"""Saves in the background: all ranks their parts, the first rank the rest, then the name.

    step loop   plan, copy to host ── next steps ──────────────────────────────►
    background                      write, checksum, fsync ─ all agree ─ publish, prune

Nobody has the new checkpoint's name before every rank has forced its part to the disk, and no
older checkpoint goes before the new one has it.  One save is in flight at most: the next one waits
for it, because a disk that cannot keep up would otherwise fill the host's memory.
"""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from litespark.checkpoint.folder import (
    CONFIG,
    RANDOM,
    STATE,
    checkpoint_name,
    prune_checkpoints,
    publish_checkpoint,
    random_states_file,
)
from litespark.checkpoint.host_copy import (
    CopySeconds,
    HostBuffers,
    HostCopy,
    copy_to_host,
    own_bytes,
    write_shards,
)
from litespark.checkpoint.integrity import FileRecord, record_of, write_file, write_marker
from litespark.checkpoint.run_state import FILE_NAME, RunState
from litespark.checkpoint.sharded import run_tensors
from litespark.config.schema import CheckpointConfig
from litespark.errors import LitesparkError
from litespark.parallel.groups import gather_objects
from litespark.parallel.rng import random_states
from litespark.utils.files import fsync_path

logger = logging.getLogger("litespark.checkpoint")
# A disk may take as long as it takes; that a rank has died shows at once, by its connection.
NO_LIMIT = timedelta(days=7)
_SECONDS_BETWEEN_MESSAGES = 60.0


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended: the checkpoint, or the reason why there is none.

    `num_bytes` is what all ranks wrote, `seconds` the time of the background's work, and `copying`
    what training waited for on this rank.
    """

    step: int
    checkpoint: Path | None
    problem: str
    num_bytes: int
    seconds: float
    copying: CopySeconds


@dataclass
class _Job:
    """Everything the background needs; nothing in it changes while training goes on."""

    copy: HostCopy
    random_states: str
    state: RunState
    config_yaml: str
    on_outcome: Callable[[SaveOutcome], None] | None
    outcome: SaveOutcome | None = None


class CheckpointSaver:
    """Writes the checkpoints of one run; every rank has one, and all call its methods together.

    Args:
        checkpoints: the run's folder of checkpoints.
        options: `checkpoint` of the configuration: asynchronous, and what to keep.
        while_waiting: entered while the caller waits for the disk, and left afterwards.
        needed: names of older checkpoints that must not be pruned now.
    """

    def __init__(
        self,
        checkpoints: Path,
        options: CheckpointConfig,
        while_waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        needed: Callable[[], Container[str]] = tuple,
    ) -> None:
        self.checkpoints = checkpoints
        self.options = options
        self._while_waiting = while_waiting
        self._needed = needed
        # Its own group: collectives of the background must not mix with those of training.
        self._group: Any = dist.new_group(backend="gloo", timeout=NO_LIMIT)
        self._buffers = HostBuffers()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None

    def prepare(self, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
        """On a GPU, begin to take the host memory that saves will need."""
        if next(chunks[0].parameters()).is_cuda:
            self._buffers.prepare(own_bytes(run_tensors(chunks, optimizer)))

    def save(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        state: RunState,
        config_yaml: str,
        on_outcome: Callable[[SaveOutcome], None] | None = None,
    ) -> None:
        """Start to save the state as it is now; returns when it is copied to the host.

        A save that is still in flight is waited for first.  `on_outcome` is called when this one
        has ended, from the background's thread.
        """
        started = time.perf_counter()
        if self._thread is not None and self._thread.is_alive():
            self.wait()
            logger.info(
                "the save of step %d waited %.1f s for the one before",
                *(state.step, time.perf_counter() - started),
            )
        self._job = None  # and with it the copy before, whose memory is used again
        copy = copy_to_host(run_tensors(chunks, optimizer), self._buffers)
        self._job = _Job(copy, json.dumps(random_states()), state, config_yaml, on_outcome)
        self._thread = threading.Thread(
            target=self._run, args=(self._job,), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.options.asynchronous:
            self.wait()

    def from_first_rank(self, value: Any) -> Any:
        """What the first rank gives, however long that takes; all ranks call it together."""
        with self._while_waiting():
            return gather_objects(value, self._group)[0]

    def wait(self, timeout_seconds: float | None = None) -> SaveOutcome | None:
        """Wait for the save in flight; how the last one ended, None without any or in time.

        A disk that takes long is no fault, so nothing ends this wait without a timeout; the log
        says every minute what is waited for.
        """
        if self._job is None or self._thread is None:
            return None
        started = time.monotonic()
        with self._while_waiting():
            while self._thread.is_alive():
                waited = time.monotonic() - started
                left = math.inf if timeout_seconds is None else timeout_seconds - waited
                if left <= 0:
                    break
                self._thread.join(min(_SECONDS_BETWEEN_MESSAGES, left))
                if self._thread.is_alive() and dist.get_rank() == 0:
                    logger.warning(
                        "waiting for the save of step %d for %.0f s already",
                        *(self._job.state.step, time.monotonic() - started),
                    )
        return self._job.outcome

    def _run(self, job: _Job) -> None:
        started = time.perf_counter()
        try:
            problem, num_bytes = self._write_and_publish(job)
        except BaseException as error:  # of the group: a rank is gone; nobody else would tell
            problem, num_bytes = f"the ranks lost each other ({_first_line(error)})", 0
        name = checkpoint_name(job.state.step)
        job.outcome = SaveOutcome(
            step=job.state.step,
            checkpoint=None if problem else self.checkpoints / name,
            problem=problem,
            num_bytes=num_bytes,
            seconds=time.perf_counter() - started,
            copying=job.copy.seconds,
        )
        if job.on_outcome is not None:
            job.on_outcome(job.outcome)

    def _write_and_publish(self, job: _Job) -> tuple[str, int]:
        """Write this rank's part, and on the first rank the rest; the problem and all bytes."""
        temporary = self.checkpoints / f".{checkpoint_name(job.state.step)}.writing"
        # Nobody writes before the first rank has removed what an earlier attempt may have left.
        problem = ""
        if dist.get_rank() == 0:
            problem = _attempt(lambda: _new_folder(temporary))
        problem = gather_objects(problem, self._group)[0]
        if problem:
            return problem, 0
        files: dict[str, FileRecord] = {}
        results: list[Any] = []

        def write() -> None:
            records, mine = write_shards(job.copy, temporary / STATE)
            files.update({f"{STATE}/{name}": record for name, record in records.items()})
            name = random_states_file(dist.get_rank())
            files[name] = write_file(temporary / name, job.random_states.encode())
            fsync_path(temporary / RANDOM)
            results.extend(mine)

        problem = _attempt(write)
        parts = gather_objects((problem, files, results), self._group)
        problem = next((part[0] for part in parts if part[0]), "")
        num_bytes = sum(record.size_bytes for part in parts for record in part[1].values())
        if dist.get_rank() == 0:
            all_files = {name: record for part in parts for name, record in part[1].items()}
            if not problem:
                all_results = [part[2] for part in parts]
                problem = _attempt(lambda: self._publish(job, temporary, all_files, all_results))
            if problem:
                shutil.rmtree(temporary, ignore_errors=True)
        return gather_objects(problem, self._group)[0], num_bytes

    def _publish(
        self, job: _Job, temporary: Path, files: dict[str, FileRecord], results: list[list[Any]]
    ) -> None:
        """What the first rank alone writes; then the marker, the name, `latest`, the pruning."""
        state = temporary / STATE
        assert job.copy.metadata is not None, "planned on the first rank"
        FileSystemWriter(state).finish(job.copy.metadata, results)
        common = io.BytesIO()
        torch.save(job.copy.common, common)
        files[f"{STATE}/common.pt"] = write_file(state / "common.pt", common.getvalue())
        save_config(CheckpointingConfig("torch_dist", 1), str(state))
        for name in (".metadata", "metadata.json"):
            fsync_path(state / name)
            files[f"{STATE}/{name}"] = record_of(state / name)
        files[CONFIG] = write_file(temporary / CONFIG, job.config_yaml.encode())
        files[FILE_NAME] = write_file(temporary / FILE_NAME, job.state.to_json().encode())
        fsync_path(state)
        write_marker(temporary, job.state.step, files)
        publish_checkpoint(temporary, self.checkpoints, job.state.step)
        if self.options.keep_last is not None:
            keep = self.options.keep_last, self.options.keep_every
            prune_checkpoints(self.checkpoints, *keep, self._needed())


def save_checkpoint(
    checkpoints: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    state: RunState,
    config_yaml: str,
) -> Path:
    """Save once and wait until it is on disk; all ranks call it together.

    Raises:
        LitesparkError: the disk is full or gone; nothing of the new checkpoint stays.
    """
    saver = CheckpointSaver(checkpoints, CheckpointConfig(asynchronous=False))
    saver.save(chunks, optimizer, state, config_yaml)
    outcome = saver.wait()
    assert outcome is not None, "it was waited for"
    return written(outcome)


def written(outcome: SaveOutcome) -> Path:
    """The checkpoint of a save.

    Raises:
        LitesparkError: there is none.
    """
    if outcome.checkpoint is None:
        raise SaveFailed(f"step {outcome.step} could not be saved: {outcome.problem}")
    return outcome.checkpoint


class SaveFailed(LitesparkError):
    """A save that failed on some rank, which all ranks know of."""

    on_every_rank = True


def _new_folder(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / STATE).mkdir(parents=True)
    (temporary / RANDOM).mkdir()


def _attempt(action: Callable[[], None]) -> str:
    """Do it; what went wrong, or nothing."""
    try:
        action()
    except BaseException as error:  # torch's CheckpointException too; the others must hear of it
        if not isinstance(error, OSError):
            logger.exception("a checkpoint could not be written")
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
