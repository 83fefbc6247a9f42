"""Whole checkpoints copied to an object store in the background, and fetched when none is local.

    s3://bucket/run/
      latest                    name of the checkpoint that was sent last
      step_000000100/...        the files of the local one, under the same names
      step_000000100/complete.json   sent last: without it a step is no checkpoint

The local folder stays what a run saves to and resumes from, so a slow or dead store holds up no
step: a checkpoint is sent when it is whole on the disk, one at a time, and one that still waits
when a newer one is whole is left out.  A store has no rename, so an object with the list of all
others does what the folder's name does on a disk.  Only one run at a time sends to a place.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from litespark.checkpoint.folder import LATEST, parse_step, prune_steps, publish_checkpoint
from litespark.checkpoint.integrity import (
    MARKER,
    ChecksumFile,
    DamagedCheckpoint,
    FileRecord,
    describe,
    read_marker,
    write_file,
)
from litespark.config.schema import CheckpointConfig
from litespark.data import storage
from litespark.errors import LitesparkError, UserError
from litespark.utils.files import fsync_path

logger = logging.getLogger("litespark.checkpoint")
_TRANSFERS = 4  # files side by side: one connection fills no network
_SECONDS_BETWEEN_MESSAGES = 60.0


@dataclass(frozen=True)
class SendOutcome:
    """How the copying of one checkpoint ended; `problem` is empty when it is in the store."""

    step: int
    place: str
    problem: str
    num_bytes: int
    seconds: float


class Mirror:
    """Sends the checkpoints of one run to `options.mirror`, in a thread; the first rank has it.

    Args:
        options: `checkpoint` of the configuration, which also says what the store keeps.
        on_outcome: called from the thread when a checkpoint is in the store, or is not.
    """

    def __init__(
        self, options: CheckpointConfig, on_outcome: Callable[[SendOutcome], None]
    ) -> None:
        assert options.mirror is not None, "a run without one has no Mirror"
        self.place = options.mirror.rstrip("/")
        self.options = options
        self._on_outcome = on_outcome
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._current: Path | None = None
        self._next: Path | None = None
        self._last: SendOutcome | None = None

    def offer(self, checkpoint: Path) -> None:
        """Send this checkpoint as soon as the one before is sent."""
        with self._lock:
            if self._next is not None:
                logger.warning(
                    "%s is not sent to %s, which is slower than the saves",
                    *(self._next.name, self.place),
                )
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()

    def needed(self) -> set[str]:
        """Names of the checkpoints that must stay on the disk for now."""
        with self._lock:
            return {path.name for path in (self._current, self._next) if path is not None}

    def wait(self, timeout_seconds: float = float("inf")) -> SendOutcome | None:
        """Wait until nothing is left to send; how the last one ended, None without any or in time.

        The log says every minute what is waited for.
        """
        started = time.monotonic()
        while (thread := self._thread) is not None:
            left = timeout_seconds - (time.monotonic() - started)
            if left <= 0:
                return None
            thread.join(min(_SECONDS_BETWEEN_MESSAGES, left))
            if thread.is_alive():
                logger.warning(
                    "waiting for %s for %.0f s already", self.place, time.monotonic() - started
                )
        return self._last

    def _run(self) -> None:
        while True:
            with self._lock:
                self._current, self._next = self._next, None
                if self._current is None:
                    self._thread = None
                    return
                checkpoint = self._current
            self._last = self._send(checkpoint)
            self._on_outcome(self._last)

    def _send(self, checkpoint: Path) -> SendOutcome:
        started, problem, num_bytes = time.perf_counter(), "", 0
        try:
            num_bytes = send_checkpoint(checkpoint, self.place)
            if self.options.keep_last is not None:
                _prune(self.place, _step(checkpoint.name), self.options)
        except Exception as error:  # whatever it is, training goes on
            if not isinstance(error, (OSError, LitesparkError)):
                logger.exception("a checkpoint could not be sent")
            problem = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - started
        step = _step(checkpoint.name)
        return SendOutcome(step, f"{self.place}/{checkpoint.name}", problem, num_bytes, seconds)


def send_checkpoint(checkpoint: Path, place: str) -> int:
    """Copy a whole local checkpoint below `place`, unless it is there; bytes that were sent.

    Raises:
        OSError: the store cannot be reached or refuses, or the checkpoint cannot be read.
        DamagedCheckpoint: its list of files is not what was written.
    """
    remote = f"{place}/{checkpoint.name}"
    records = read_marker(checkpoint)

    def send(name: str) -> int:
        return sum(storage.upload(checkpoint / name, f"{remote}/{name}"))

    sent = []
    there = _read(f"{remote}/{MARKER}") if storage.exists(f"{remote}/{MARKER}") else b""
    if there != (checkpoint / MARKER).read_bytes():
        # One of a run that was rolled back must not look whole while it is replaced.
        storage.remove(f"{remote}/{MARKER}")
        with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="mirror-file") as pool:
            sent += pool.map(send, sorted(records, key=lambda name: -records[name].size_bytes))
        sent.append(send(MARKER))
    storage.write_bytes(f"{place}/{LATEST}", f"{checkpoint.name}\n".encode())
    return sum(sent)


def remote_checkpoints(place: str) -> list[str]:
    """Complete checkpoints below a place in a store, or the one that it is, the preferred first.

    First the one that `latest` names, then older ones; then those that are newer, which a run
    that was rolled back has left behind.

    Raises:
        UserError: the store cannot be asked.
    """
    place = place.rstrip("/")
    try:
        if parse_step(place.rpartition("/")[2]) is not None:
            return [place] if storage.exists(f"{place}/{MARKER}") else []
        found = sorted(_steps(place)[0], key=_step, reverse=True)
        latest = ""
        if storage.exists(f"{place}/{LATEST}"):
            latest = _read(f"{place}/{LATEST}").decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            place,
            f"cannot be read ({error})",
            "Look at the address, at AWS_ENDPOINT_URL, and at who you are there.",
        ) from None
    if latest in found:
        number = found.index(latest)
        found = found[number:] + found[:number]
    return [f"{place}/{name}" for name in found]


def fetch_first_whole(remotes: Sequence[str], checkpoints: Path) -> Path:
    """Fetch the first checkpoint that is whole into a run's folder; its path there.

    Every byte is compared with its checksum on the way; a damaged one is named in the log.

    Raises:
        UserError: none is whole.
        LitesparkError: a transfer failed, or the disk is full.
    """
    faults = []
    for remote in remotes:
        try:
            return _fetch(remote, checkpoints)
        except DamagedCheckpoint as error:
            faults.append(f"{remote.rpartition('/')[2]}: {describe(error.faults[:1])}")
            logger.error("checkpoint %s is damaged: %s", remote, describe(error.faults))
        except OSError as error:
            raise LitesparkError(f"{remote} could not be fetched: {error}") from error
    raise UserError(
        remotes[0].rpartition("/")[0],
        f"holds {len(faults)} checkpoints and each is damaged: {'; '.join(faults)}",
        "Give another place, or start anew without it.",
    )


def _fetch(remote: str, checkpoints: Path) -> Path:
    name = remote.rpartition("/")[2]
    started = time.perf_counter()
    temporary = checkpoints / f".{name}.fetching"  # what `remove_leftovers` removes after a kill
    folder = temporary / name
    shutil.rmtree(temporary, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        write_file(folder / MARKER, _read(f"{remote}/{MARKER}"))
        records = read_marker(folder)
        total_bytes = sum(record.size_bytes for record in records.values())
        logger.info("fetching %s: %.2f GB", remote, total_bytes / 1e9)
        with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="mirror-file") as pool:
            names = sorted(records, key=lambda name: -records[name].size_bytes)
            found = pool.map(lambda name: _fetch_file(remote, folder, name, records[name]), names)
            faults = [fault for fault in found if fault]
        if faults:
            raise DamagedCheckpoint(folder, faults)
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                fsync_path(path)
        fetched = publish_checkpoint(folder, checkpoints, _step(name))
        logger.info("fetched %s in %.1f s", remote, time.perf_counter() - started)
        return fetched
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch_file(remote: str, folder: Path, name: str, record: FileRecord) -> str | None:
    """Fetch one file of those that the marker lists; what is wrong with it, if anything."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ChecksumFile(path) as file:
            for block in storage.read_blocks(f"{remote}/{name}"):
                file.write(block)
            found = file.force()
    except FileNotFoundError:
        return f"{remote}/{name} is missing"
    if found != record:
        return f"{remote}/{name} has other content than was written"
    return None


def _steps(place: str) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the complete checkpoints, and all objects of each step's folder."""
    objects: dict[str, list[str]] = {}
    for file in storage.list_files(place):
        name, _, rest = file.path.removeprefix(f"{place}/").partition("/")
        if rest and parse_step(name) is not None:
            objects.setdefault(name, []).append(file.path)
    complete = [name for name, paths in objects.items() if f"{place}/{name}/{MARKER}" in paths]
    return complete, objects


def _prune(place: str, latest_step: int, options: CheckpointConfig) -> None:
    """Remove what the configuration does not keep, and what an upload that was killed has left.

    Later checkpoints than the latest, of a run that was rolled back, are left alone.
    """
    assert options.keep_last is not None, "nothing is pruned without it"
    complete, objects = _steps(place)
    steps = [step for step in map(_step, complete) if step <= latest_step]
    doomed = prune_steps(steps, options.keep_last, options.keep_every)
    for name, paths in objects.items():
        if name in complete and _step(name) not in doomed:
            continue
        marker = f"{place}/{name}/{MARKER}"  # goes first: what is left must not look whole
        storage.remove_all([path for path in paths if path == marker])
        storage.remove_all([path for path in paths if path != marker])


def _step(name: str) -> int:
    step = parse_step(name)
    assert step is not None, "other names are passed over"
    return step


def _read(remote: str) -> bytes:
    return b"".join(storage.read_blocks(remote))
