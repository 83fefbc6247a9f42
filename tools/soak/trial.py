"""A small run whose ranks are processes of their own, started within a second.

The ranks are forked from a server that has imported torch and megatron-core, so that a trial of
hundreds of restarts does not spend its time on imports.  What a rank then does is what `litespark
train` does in it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tools.free_port import free_port

VOCAB_SIZE = 64
LAYOUTS = {
    1: [[]],
    2: [
        ["parallel.pipeline=2"],
        ["parallel.tensor=2"],
        [],
    ],
    4: [["parallel.tensor=2", "parallel.pipeline=2"], ["parallel.tensor=2"]],
}


@dataclass(frozen=True)
class Trial:
    """One configuration on a number of processes."""

    config: Path
    processes: int
    overrides: tuple[str, ...]

    def start(self, output_dir: Path) -> list[BaseProcess]:
        """Start all ranks; they train, resuming from what `output_dir` holds, and end."""
        overrides = [*self.overrides, f"run.output_dir={output_dir}"]
        log = output_dir.with_name(output_dir.name + ".log")
        return start_ranks(self.processes, log, _train, str(self.config), overrides)


def start_ranks(
    processes: int, log: Path, target: Callable[..., int], *arguments: Any
) -> list[BaseProcess]:
    """Start `target(*arguments)` in that many ranks; output goes to the log, and they exit with
    what it returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.soak.preload"])
    port = free_port()
    ranks = []
    for rank in range(processes):
        about = (rank, processes, port, str(log), target, arguments)
        ranks.append(context.Process(target=_run_rank, args=about))
        ranks[-1].start()
    return ranks


def write_trial(folder: Path, steps: int, keep_last: int) -> Path:
    """Write a shard of tokens and a configuration that saves after every step; its path."""
    from litespark.data.indexed import IndexedWriter

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    with IndexedWriter(str(folder / "tokens"), VOCAB_SIZE) as writer:
        for _ in range(40):
            writer.add_document(generator.integers(0, VOCAB_SIZE, size=150).tolist())
    tree: dict[str, Any] = {
        "run": {"output_dir": str(folder / "run")},
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCAB_SIZE,
            "max_sequence_length": 64,
        },
        "precision": {"mode": "bf16"},
        "data": {"blend": [{"prefix": str(folder / "tokens")}], "sequence_length": 32},
        "batch": {"global": 8, "micro": 2},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": steps, "save_every": 1, "log_every": 1},
        "checkpoint": {"keep_last": keep_last},
        "logging": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(output_dir: Path) -> dict[int, float]:
    """The loss of each step in a run's metrics."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def events(output_dir: Path) -> list[dict[str, Any]]:
    """A run's events; a line that a kill has cut short is no event."""
    path = output_dir / "events.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def shards(checkpoint: Path) -> dict[str, bytes]:
    """The tensor files of a checkpoint, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(checkpoint.glob("state/*.distcp"))}


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    log: str,
    target: Callable[..., int],
    arguments: tuple[Any, ...],
) -> None:
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.exit(target(*arguments))


def _train(config: str, overrides: list[str]) -> int:
    """One rank; its exit code is the command's."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from litespark.cli.main import main

    return main(["train", config, *overrides])
