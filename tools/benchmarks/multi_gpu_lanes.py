"""Runs cases in groups of processes that are watched, and ended whatever happens to them.

Each rank is the leader of a process group of its own, so that nothing it started outlives it.  When
a case fails or takes too long, its last words are kept, all ranks are killed, and new ones go on
with the cases after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.benchmarks.multi_gpu_cases import Case, Lane
from tools.benchmarks.multi_gpu_rank import NEEDS_FRESH_PROCESS
from tools.free_port import free_port

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
RANK_SCRIPT = ROOT / "tools" / "benchmarks" / "multi_gpu_rank.py"
START_SECONDS = 120.0  # until the first case begins: imports from a cold disk
LAST_LINES = 40
LEAVE_SECONDS = 5.0
_POLL_SECONDS = 0.1
# NVLink multicast can put a host's GPUs out of service that others share (NCCL, torch, NVSHMEM).
_VARIABLES = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
}
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Report:
    """Results of all cases, written to a file after each; used by several lanes at once."""

    path: Path
    head: Record
    records: list[Record] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, case: Case, **outcome: Any) -> None:
        """Keep one case's outcome: `result` or `problem`."""
        record = {
            "name": case.name,
            "kind": case.kind,
            "gpus": case.gpus,
            "words": list(case.words),
            "compared_with": case.compared_with,
            **outcome,
        }
        with self._lock:
            self.records.append(record)
            self.write()
        seconds = f" in {outcome['seconds']:.0f} s" if "seconds" in outcome else ""
        problem = f": {outcome['problem']}" if "problem" in outcome else ""
        print(f"{case.name}{seconds}{problem}", flush=True)

    def write(self) -> None:
        """Write everything."""
        temporary = self.path.with_suffix(".writing")
        temporary.write_text(json.dumps(self.head | {"cases": self.records}, indent=1) + "\n")
        temporary.replace(self.path)

    def find(self, name: str | None) -> Record | None:
        """The result of a case; None where there is none."""
        return next((r.get("result") for r in self.records if r["name"] == name), None)


@dataclass(frozen=True)
class Place:
    """Where groups run: `device` cuda or cpu, logs and scratch files, the peer's packages."""

    device: str
    logs: Path
    scratch: Path
    peer_path: str | None = None


def run_lane(lane: Lane, place: Place, report: Report, deadline: float) -> None:
    """Run all cases of a lane; those that the time does not suffice for are reported as not run."""
    remaining = list(lane.cases)
    while remaining:
        if time.monotonic() >= deadline:
            report.add(remaining.pop(0), problem="not run: the time was over")
            continue
        same = [c for c in remaining if _needs(c) == _needs(remaining[0])]
        done = Group(same, lane.first, place, report, deadline).run()
        remaining = [case for case in remaining if case.name not in done]


def _needs(case: Case) -> tuple[int, int, bool]:
    """Cases that need the same share their processes."""
    return case.ranks, case.gpus, case.kind == "peer"


class Group:
    """The processes of some cases, from their start to their end."""

    def __init__(
        self, cases: list[Case], first_gpu: int, place: Place, report: Report, deadline: float
    ) -> None:
        self.cases = cases
        self.first_gpu = first_gpu
        self.place = place
        self.report = report
        self.deadline = deadline
        self.name = f"{first_gpu}-{time.monotonic_ns()}"
        self.progress = place.logs / f"{self.name}.jsonl"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.began = time.monotonic()
        self.lines_read = 0
        self.current: Case | None = None
        self.done: set[str] = set()

    def run(self) -> set[str]:
        """Run until all cases are done or one fails; the names of those that need no other try."""
        try:
            self._start()
            problem = self._watch()
            if problem is not None:
                case = self.current or next(c for c in self.cases if c.name not in self.done)
                log = self._last_words()
                seconds = time.monotonic() - self.began
                self.report.add(case, problem=problem, log=log, seconds=seconds)
                self.done.add(case.name)
        finally:
            self._kill()
        return self.done

    def _start(self) -> None:
        cases_path = self.progress.with_suffix(".cases.json")
        cases = [
            {"name": c.name, "kind": c.kind, "words": list(c.words), "port": free_port()}
            for c in self.cases
        ]
        cases_path.write_text(json.dumps(cases))
        ranks = self.cases[0].ranks
        for rank in range(ranks):
            with open(self._log(rank), "wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(RANK_SCRIPT), str(cases_path), str(self.progress)],
                        env=self._environment(rank, ranks),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        start_new_session=True,
                    )
                )

    def _environment(self, rank: int, ranks: int) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHERS} | _VARIABLES
        gpus = range(self.first_gpu, self.first_gpu + self.cases[0].gpus)
        visible = ",".join(map(str, gpus)) if self.place.device == "cuda" else ""
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        if self.cases[0].kind == "peer" and self.place.peer_path:
            paths.insert(0, self.place.peer_path)
        return environment | {
            "CUDA_VISIBLE_DEVICES": visible,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "LITESPARK_BENCH_SCRATCH": str(self.place.scratch / self.name),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
        }

    def _watch(self) -> str | None:
        """Until the end: None when all ended well, else what went wrong with the current case."""
        while True:
            codes = [process.poll() for process in self.processes]
            self._read_progress()  # after the codes: an ended rank has written all
            if len(self.done) == len(self.cases):
                self._let_end()
                return None
            if all(code == 0 for code in codes):
                return "the processes ended without a result"
            failed = [rank for rank, code in enumerate(codes) if code]
            if any(codes[rank] == NEEDS_FRESH_PROCESS for rank in failed):
                return None
            if failed:
                time.sleep(1.0)  # for the last words of the others
                self._read_progress()
                if len(self.done) == len(self.cases):
                    return None
                return f"rank {failed[0]} ended with exit code {codes[failed[0]]}"
            now = time.monotonic()
            limit = START_SECONDS if self.current is None else self.current.timeout_seconds
            if now >= self.deadline or now - self.began > limit:
                self._ask_for_stacks()
                over = "the time was over" if now >= self.deadline else f"took over {limit:.0f} s"
                return f"ended after {now - self.began:.0f} s: {over}"
            time.sleep(_POLL_SECONDS)

    def _let_end(self) -> None:
        """Everything is done: the processes have a moment to leave by themselves."""
        until = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < until and any(p.poll() is None for p in self.processes):
            time.sleep(_POLL_SECONDS)

    def _read_progress(self) -> None:
        if not self.progress.exists():
            return
        # What follows the last end of line is being written.
        lines = self.progress.read_text(encoding="utf-8").split("\n")[:-1]
        by_name = {case.name: case for case in self.cases}
        for text in lines[self.lines_read :]:
            line = json.loads(text)
            now = time.monotonic()
            if line["event"] == "begin":
                self.current = by_name[line["name"]]
            else:
                case, self.current = by_name[line["name"]], None
                self.report.add(case, result=line["result"], seconds=now - self.began)
                self.done.add(case.name)
            self.began = now
        self.lines_read = len(lines)

    def _ask_for_stacks(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        time.sleep(1.0)

    def _last_words(self) -> str:
        """The end of the log of the rank that seems to have failed first, and of rank 0."""
        codes = [process.poll() for process in self.processes]
        failed = [rank for rank, code in enumerate(codes) if code] or list(range(len(codes)))[:2]
        with_traceback = [r for r in failed if "Traceback" in self._text(r)] or failed
        parts = []
        for rank in sorted({with_traceback[0], failed[-1]}):
            lines = self._text(rank).splitlines()[-LAST_LINES:]
            parts.append("\n".join([f"--- rank {rank}", *lines]))
        return "\n".join(parts)

    def _text(self, rank: int) -> str:
        return self._log(rank).read_text(encoding="utf-8", errors="replace")

    def _log(self, rank: int) -> Path:
        return self.progress.with_suffix(f".rank{rank}.log")

    def _kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
