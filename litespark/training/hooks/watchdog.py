"""Ends a run that no longer moves, or that has lost a rank, and says who and where.

A hang has one cause and as many victims as there are ranks: one rank does not come to a collective
and all others wait in it, without a word.  A thread in every rank looks at what its training thread
is doing (`Progress`) and tells the others through a key-value store, over a connection of its own,
as the training thread may be waiting on the other one.

    nothing changes on a rank for 0.8 hang_seconds  it raises the alarm
    nothing is heard of a rank for as long          the rank before it does
    a rank sees the alarm                           it writes its progress and its stack down
    the lowest rank that answers                    collects, reports, and names who is behind
    all                                             exit code 4; who does not answer is killed

While a rank waits for a disk to take or give a checkpoint its clock stands still: disks are slow,
and not dead.  It goes on to be heard, so that one that is frozen meanwhile is found.

The same thread notices when a process of this machine is gone, and when a rank anywhere ends with
an error of its own: the others would wait for it until their collectives time out.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from litespark.errors import ExitCode, LitesparkError
from litespark.parallel.groups import gather_objects
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.utils.files import write_text_atomically
from litespark.utils.processes import is_alive

_ALARM, _FAILED = "litespark/alarm", "litespark/failed"
_GRACE_SECONDS = 5.0  # for a training thread that finds out by itself, and reports better
_FRAMES = 6  # of each stack in the message; the file has all


@dataclass(frozen=True)
class Sign:
    """What one rank was doing; `idle_seconds` since it last did anything else."""

    rank: int
    step: int
    micro_batch: int
    phase: str
    changes: int
    idle_seconds: float
    stack: list[str]

    def describe(self) -> str:
        """One line."""
        return (
            f"step {self.step}, micro-batch {self.micro_batch}, {self.phase}, "
            f"for {self.idle_seconds:.0f} s"
        )


class Board:
    """Keys that all ranks of a job read and write; a store, or a dictionary for a single rank.

    `start` names this start of the job: torchrun's store goes on to be used by the next.
    """

    def __init__(self, world_size: int, start: str) -> None:
        store: Any = HashStore()
        if world_size > 1:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            wait = timedelta(seconds=10)
            store = TCPStore(host, port, None, False, wait, wait_for_workers=False)
        self.store = PrefixStore(start, store)

    def write(self, key: str, value: object) -> None:
        """Set a key to a value of JSON."""
        self.store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """The value of a key, None if it was never set."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None


class Watchdog(Hook):
    """Watches this rank's progress and its fellows; `resilience.hang_seconds` is the patience."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def on_start(self, run: TrainingRun) -> None:
        """Learn who else there is, and start looking."""
        self.run, self.rank = run, run.process.rank
        self.patience = run.config.resilience.hang_seconds
        self.training_thread = threading.get_ident()
        self.fellows: list[tuple[str, int]] = gather_objects((socket.gethostname(), os.getpid()))
        host, pid = self.fellows[0]
        self.board = Board(run.process.world_size, f"{host}/{pid}")
        self.seen_changes, self.since = run.progress.changes, time.monotonic()
        self.next_sign, self.heard = None, time.monotonic()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Say how this rank ends, and stop looking."""
        if self.thread is None:
            return
        self.stopping.set()
        self.thread.join()
        error = sys.exc_info()[1]
        alone = error is not None and not getattr(error, "on_every_rank", False)
        with suppress(Exception):  # the store ends with the rank that holds it
            self.board.write(_key("ended", self.rank), True)
            if alone:
                words = error if isinstance(error, LitesparkError) else repr(error)
                self.board.write(_FAILED, {"rank": self.rank, "words": str(words)})

    # ------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        interval = min(1.0, 1.0 if self.patience is None else self.patience / 20)
        while not self.stopping.wait(interval):
            try:
                self._look()
            except (RuntimeError, ConnectionError):  # the store's end; its holder is a fellow
                self._check_fellows(None)

    def _look(self) -> None:
        progress = self.run.progress
        if progress.is_suspended or progress.changes != self.seen_changes:
            self.seen_changes, self.since = progress.changes, time.monotonic()
        self.board.write(_key("sign", self.rank), asdict(self._sign(with_stack=False)))
        failed = self.board.read(_FAILED)
        if failed is not None and failed["rank"] != self.rank:
            self._end_after(failed["rank"], failed["words"])
        self._check_fellows(self.board)
        if self.patience is not None:
            now = time.monotonic()
            if max(now - self.since, self._silence(now)) >= 0.8 * self.patience:
                self.board.write(_ALARM, self.rank)
            if self.board.read(_ALARM) is not None:
                self._report_hang()

    def _silence(self, now: float) -> float:
        """Seconds since the next rank was last heard of; its thread writes every second."""
        rank = (self.rank + 1) % len(self.fellows)
        sign = self.board.read(_key("sign", rank))
        if sign != self.next_sign or self.board.read(_key("ended", rank)) is not None:
            self.next_sign, self.heard = sign, now
        return now - self.heard

    def _sign(self, *, with_stack: bool) -> Sign:
        progress = self.run.progress
        frame = sys._current_frames().get(self.training_thread) if with_stack else None
        return Sign(
            rank=self.rank,
            step=progress.step,
            micro_batch=progress.micro_batch,
            phase=progress.phase,
            changes=progress.changes,
            idle_seconds=time.monotonic() - self.since,
            stack=[] if frame is None else traceback.format_stack(frame),
        )

    def _check_fellows(self, board: Board | None) -> None:
        """Look for processes of this machine that are gone without having said so."""
        here = self.fellows[self.rank][0]
        for rank, (host, pid) in enumerate(self.fellows):
            if host != here or rank == self.rank or is_alive(pid):
                continue
            if board is None:
                self._end_after(rank, "")
            elif board.read(_key("ended", rank)) is None:
                sign = board.read(_key("sign", rank))
                words = "" if sign is None else f"last seen at {Sign(**sign).describe()}"
                board.write(_FAILED, {"rank": rank, "words": words})
                self._end_after(rank, words)

    def _end_after(self, rank: int, words: str) -> None:
        """End because another rank has, unless the training thread does so first."""
        host, pid = self.fellows[rank]
        if self.rank == (0 if rank else 1):
            text = f"rank {rank} (process {pid} on {host}) is gone" + (
                f": {words}" if words else ""
            )
            sys.stderr.write(f"litespark: error: {text}; the other ranks end too\n")
        if not self.stopping.wait(_GRACE_SECONDS):
            sys.stderr.flush()
            os._exit(ExitCode.FAILED)

    # ---------------------------------------------------------------------------- hangs

    def _report_hang(self) -> None:
        assert self.patience is not None
        self.board.write(_key("stack", self.rank), asdict(self._sign(with_stack=True)))
        deadline = time.monotonic() + 0.15 * self.patience
        signs: dict[int, Sign] = {}
        while time.monotonic() < deadline and len(signs) < len(self.fellows):
            for rank in range(len(self.fellows)):
                if rank not in signs and (sign := self.board.read(_key("stack", rank))):
                    signs[rank] = Sign(**sign)
            time.sleep(0.05)
        if self.rank == min(signs):
            self._write_report(signs)
        time.sleep(min(1.0, 0.05 * self.patience))  # until the reporter has written
        for rank, (host, pid) in enumerate(self.fellows):
            if rank not in signs and host == self.fellows[self.rank][0]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os._exit(ExitCode.ENDED_BY_GUARD)

    def _write_report(self, signs: dict[int, Sign]) -> None:
        assert self.patience is not None
        missing = behind(signs, len(self.fellows))
        names = ", ".join(f"rank {rank} on {self.fellows[rank][0]}" for rank in missing)
        reason = (
            f"the run hangs: no progress on some rank for {0.8 * self.patience:.0f} s "
            f"(resilience.hang_seconds = {self.patience:g}); "
            + (f"did not arrive: {names}" if missing else "every rank waits for the others")
        )
        path = self.run.folder / "hang.txt"
        write_text_atomically(path, "\n".join([reason, *self._lines(signs, frames=None)]) + "\n")
        self.run.append_event("hang", reason)
        lines = self._lines(signs, frames=_FRAMES, only=missing or [min(signs)])
        sys.stderr.write("\n".join([*lines, f"all stacks: {path}", f"litespark: error: {reason}"]))
        sys.stderr.write("\n")
        sys.stderr.flush()

    def _lines(
        self, signs: dict[int, Sign], *, frames: int | None, only: list[int] | None = None
    ) -> list[str]:
        """What each rank was doing; the stacks of `only`, or of all, with the last `frames`."""
        lines = []
        for rank, (host, pid) in enumerate(self.fellows):
            sign = signs.get(rank)
            doing = "no answer" if sign is None else sign.describe()
            lines.append(f"rank {rank} (process {pid} on {host}): {doing}")
            if sign is not None and (only is None or rank in only):
                lines += [line.rstrip() for line in sign.stack[-(frames or len(sign.stack)) :]]
        return lines


def behind(signs: dict[int, Sign], world_size: int) -> list[int]:
    """The ranks that the others wait for: those without an answer, or with the least progress.

    Ranks count the same changes, so the lowest count is the furthest behind.  Of equals, the one
    that is not inside torch's communication; none if all are or none is.
    """
    silent = [rank for rank in range(world_size) if rank not in signs]
    if silent:
        return silent
    least = min(sign.changes for sign in signs.values())
    last = [rank for rank, sign in signs.items() if sign.changes == least]
    if len(last) < world_size or world_size == 1:
        return last
    busy = [rank for rank, sign in signs.items() if not _communicates(sign)]
    return busy if len(busy) < world_size else []


def _communicates(sign: Sign) -> bool:
    places = (
        os.path.join("torch", "distributed"),
        os.path.join("megatron", "core", "pipeline_parallel", "p2p"),
    )
    return any(place in line for line in sign.stack[-_FRAMES:] for place in places)


def _key(kind: str, rank: int) -> str:
    return f"litespark/{kind}/{rank}"
