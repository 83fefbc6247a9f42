"""`kill -9` of one rank of a run: how soon it is noticed, and when the run is where it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from tools.benchmarks.learnable import LearnableSamples

STEPS, SAVE_EVERY, KILL_AFTER = 30, 5, 12
_POLL_SECONDS = 0.02
_WORD_LIKE = re.compile(r"is gone|was ended by|restart 1 of")


def kill_a_rank(scratch: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, kill the last rank after some steps, and wait for the end of the restarted run.

    `overrides` are the configuration's; the number of processes is that of the GPUs to be seen, 2
    without any.

    Raises:
        RuntimeError: the run did not end well, with the end of its log.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    config = _write_run(scratch)
    processes = len([g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]) or 2
    log_path = scratch / "train.log"
    launcher = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    with open(log_path, "wb") as log:
        run = subprocess.Popen(
            [
                *(sys.executable, "-m", "litespark", "train", str(config), *overrides),
                *("--nproc", str(processes), "--max-restarts", "1"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={key: value for key, value in os.environ.items() if key not in launcher},
        )
    metrics = scratch / "run" / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def wait_for(what: str, condition: Any) -> float:
        while not condition():
            if run.poll() is not None:
                raise RuntimeError(f"ended before {what}:\n{log_path.read_text()[-4000:]}")
            time.sleep(_POLL_SECONDS)
        return time.time()

    wait_for("it was killed", lambda: steps() >= KILL_AFTER)
    victim = _rank_process(run.pid, processes - 1)
    log_length = log_path.stat().st_size
    os.kill(victim, signal.SIGKILL)
    killed_at, step_then = time.time(), steps()

    def log_since() -> str:
        return log_path.read_text(errors="replace")[log_length:]

    noticed_at = wait_for("it noticed", lambda: _WORD_LIKE.search(log_since()))
    restarted_at = wait_for("it restarted", lambda: "restart 1 of" in log_since())
    # Steps after the checkpoint are made again, and their lines written again.
    events = scratch / "run" / "events.jsonl"
    wait_for("it resumed", lambda: events.read_text().count('"resumed"') > 0)
    resumed_at = time.time()
    recovered_at = wait_for("it was where it had been", lambda: steps() > step_then)
    code = run.wait()
    if code:
        raise RuntimeError(f"exit code {code}:\n{log_path.read_text()[-4000:]}")
    return {
        "processes": processes,
        "killed_after_step": step_then,
        "noticed_seconds": noticed_at - killed_at,
        "all_ended_seconds": restarted_at - killed_at,
        "resumed_seconds": resumed_at - killed_at,
        "at_the_same_step_seconds": recovered_at - killed_at,
        "events": [json.loads(line) for line in events.read_text().splitlines()],
        "exit_code": code,
    }


def _rank_process(launcher: int, rank: int) -> int:
    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise RuntimeError(f"rank {rank} is not to be found")


def _write_run(folder: Path) -> Path:
    """A shard and the configuration of a small run."""
    from litespark.data.indexed import IndexedWriter

    vocab, length = 2048, 64
    samples = LearnableSamples(vocab, length)
    with IndexedWriter(str(folder / "tokens"), vocab) as writer:
        for index in range(1000):
            writer.add_document(np.asarray(samples.read(index).tokens).tolist())
    tree = {
        "run": {"output_dir": str(folder / "run")},
        "model": {"preset": "tiny"},
        "data": {
            "blend": [{"prefix": str(folder / "tokens")}],
            "split": [100, 0, 0],
            "sequence_length": length,
        },
        "batch": {"global": 16, "micro": 2},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": STEPS, "save_every": SAVE_EVERY},
        "logging": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
