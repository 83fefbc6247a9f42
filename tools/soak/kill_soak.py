"""Kills a small training run again and again, and compares what is left with a run left alone.

    python tools/soak/kill_soak.py --kills 200 --folder /tmp/soak --json result.json

Real processes on the CPU, 1 to 4 of them, and real `kill -9`, at random moments: of one rank, or of
all at once.  After each kill every checkpoint that has its name is read and compared with its
checksums, and the next start has to resume at the newest of them.  When a run reaches its end, the
losses of all its steps and the bytes of its last checkpoint have to be those of the undisturbed
run.  Ends with exit code 1 if anything differs.

The ranks are forked from a server that has imported everything, so a start costs a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LAYOUTS = {
    "1 process": (1, []),
    "TP2": (2, ["parallel.tensor=2"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "DP2": (2, []),
    "TP2 x DP2": (4, ["parallel.tensor=2"]),
}
PRELOAD = ["litespark.training.run", "torch.distributed.checkpoint", "torch.utils.tensorboard"]
END_SECONDS = 60.0  # for a run that nobody kills; and for ranks whose neighbour was killed


@dataclass
class Result:
    """What was seen."""

    kills: int = 0
    kills_during_a_save: int = 0
    kills_before_the_first_checkpoint: int = 0
    kills_by_layout: dict[str, int] = field(default_factory=dict)
    finished_runs: int = 0
    checkpoints_read: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Run the soak; 0 if nothing was lost and nothing differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--folder", type=Path, required=True, help="to work in; made anew")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default: 40)")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    config = write_config(args.folder, args.steps)
    result, chance, started = Result(), random.Random(args.seed), time.time()
    whole = {name: run_whole(config, args.folder, name) for name in LAYOUTS}
    while result.kills < args.kills and len(result.faults) < 10:
        name = list(LAYOUTS)[result.finished_runs % len(LAYOUTS)]
        run_dir = args.folder / f"run{result.finished_runs}"
        soak_one_run(config, run_dir, name, args.kills, result, chance)
        result.faults += [f"{run_dir.name}: {fault}" for fault in compare(run_dir, whole[name])]
        result.finished_runs += 1
        shutil.rmtree(run_dir)
    report = asdict(result) | {"seconds": round(time.time() - started, 1), "seed": args.seed}
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if result.faults else 0


def soak_one_run(
    config: Path, run_dir: Path, name: str, kills: int, result: Result, chance: random.Random
) -> None:
    """Start a run, kill it, look, and start it again, until it has come to its end."""
    while True:
        expected = newest_step(run_dir)
        ranks = start(config, run_dir, name)
        # The first half second is start-up; a run that nobody kills takes about 2 s more.
        is_last = result.kills >= kills
        deadline = time.monotonic() + (END_SECONDS if is_last else chance.uniform(0.3, 3.0))
        while time.monotonic() < deadline and any(rank.is_alive() for rank in ranks):
            time.sleep(0.002)
        if not any(rank.is_alive() for rank in ranks):
            codes = [rank.exitcode for rank in ranks]
            if any(codes):
                result.faults.append(f"{run_dir.name}: ended with {codes}: {last_words(run_dir)}")
            check_resumed(run_dir, expected, result)
            return
        writing = list((run_dir / "checkpoints").glob(".step_*"))
        kill(ranks, chance)
        result.kills += 1
        result.kills_during_a_save += bool(writing)
        result.kills_by_layout[name] = result.kills_by_layout.get(name, 0) + 1
        result.kills_before_the_first_checkpoint += newest_step(run_dir) is None
        check_resumed(run_dir, expected, result)
        check_checkpoints(run_dir, result)
        if is_last or len(result.faults) >= 10:
            return


def kill(ranks: list[BaseProcess], chance: random.Random) -> None:
    """SIGKILL to one rank, or to all; those that are left get what a launcher would give them."""
    victims = ranks if chance.random() < 0.3 else [chance.choice(ranks)]
    for rank in victims:
        if rank.is_alive():
            os.kill(rank.pid or 0, signal.SIGKILL)
    # What the others do in the meantime, such as publishing a checkpoint, must do no harm.
    time.sleep(chance.uniform(0.0, 0.3))
    for rank in ranks:
        if rank.is_alive():
            os.kill(rank.pid or 0, signal.SIGKILL)
    for rank in ranks:
        rank.join()


def check_resumed(run_dir: Path, expected: int | None, result: Result) -> None:
    """The start must have resumed from what was the newest checkpoint, if it came that far."""
    found = events(run_dir)
    starts = [event for event in found if event["event"] in ("started", "resumed")]
    if not starts or expected is None:
        return
    last = starts[-1]
    if last["event"] == "started" or last["step"] < expected:
        result.faults.append(f"{run_dir.name}: newest was {expected}, and the run {last}")
    result.faults += [
        f"{run_dir.name}: {event}" for event in found if event["event"] == "damaged_checkpoint"
    ]


def check_checkpoints(run_dir: Path, result: Result) -> None:
    """Everything that has the name of a checkpoint must be whole, and be what was called saved."""
    from litespark.checkpoint.folder import complete_checkpoints
    from litespark.checkpoint.integrity import problems_of

    for checkpoint in complete_checkpoints(run_dir / "checkpoints"):
        result.checkpoints_read += 1
        result.faults += [f"{checkpoint}: {problem}" for problem in problems_of(checkpoint)]
    saved = [event["step"] for event in events(run_dir) if event["event"] == "checkpoint"]
    newest = newest_step(run_dir)
    if saved and (newest is None or newest < saved[-1]):
        result.faults.append(
            f"{run_dir.name}: step {saved[-1]} was called saved, there is {newest}"
        )


def compare(run_dir: Path, whole: Path) -> list[str]:
    """Differences between a run that was killed and one that was not."""
    faults = []
    for name, read in (("losses", losses), ("bytes of the last checkpoint", last_checkpoint)):
        if read(run_dir) != read(whole):
            faults.append(f"the {name} differ from those of {whole.name}")
    return faults


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of every step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def last_checkpoint(run_dir: Path) -> dict[str, bytes]:
    """The tensor files of the newest checkpoint."""
    folder = run_dir / "checkpoints" / f"step_{newest_step(run_dir) or 0:09d}" / "state"
    return {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


def newest_step(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint."""
    from litespark.checkpoint.folder import newest_checkpoint, step_of

    newest = newest_checkpoint(run_dir / "checkpoints")
    return None if newest is None else step_of(newest)


def events(run_dir: Path) -> list[dict[str, Any]]:
    """The run's events; a kill may have cut the last line."""
    found = []
    path = run_dir / "events.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_words(run_dir: Path) -> str:
    """The end of what the ranks printed."""
    return run_dir.with_suffix(".log").read_text(errors="replace")[-800:]


def run_whole(config: Path, folder: Path, name: str) -> Path:
    """The undisturbed run at a layout."""
    run_dir = folder / f"whole {name}"
    ranks = start(config, run_dir, name)
    for rank in ranks:
        rank.join(END_SECONDS)
    if any(rank.exitcode for rank in ranks):
        sys.exit(f"the undisturbed run failed: {last_words(run_dir)}")
    return run_dir


def start(config: Path, run_dir: Path, name: str) -> list[BaseProcess]:
    """Start the ranks of a run."""
    world_size, overrides = LAYOUTS[name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    arguments = (world_size, port, str(config), [*overrides, f"run.output_dir={run_dir}"])
    ranks: list[BaseProcess] = []
    for number in range(world_size):
        process = context.Process(target=run_rank, args=(number, *arguments), daemon=True)
        process.start()
        ranks.append(process)
    return ranks


def run_rank(rank: int, world_size: int, port: int, config: str, overrides: list[str]) -> None:
    """One rank, as torchrun would start it."""
    import torch

    from litespark.config.load import load_config
    from litespark.training.run import run_training

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    loaded = load_config(config, overrides)
    log = os.open(f"{loaded.run.output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    run_training(loaded)


def write_config(folder: Path, steps: int) -> Path:
    """A model of a few thousand weights on random tokens, saved every second step."""
    import numpy as np
    import yaml

    from litespark.data.indexed import IndexedWriter

    generator = np.random.default_rng(0)
    with IndexedWriter(str(folder / "tokens"), 100) as writer:
        for _ in range(40):
            writer.add_document(generator.integers(0, 100, size=100).tolist())
    tree = {
        "run": {"output_dir": str(folder / "run")},
        "model": {
            "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
            "num_query_groups": 2, "vocab_size": 100, "max_sequence_length": 32,
        },
        "precision": {"mode": "fp32"},
        "data": {"blend": [{"prefix": str(folder / "tokens")}], "sequence_length": 16},
        "batch": {"global": 4, "micro": 1},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": steps, "save_every": 2, "log_every": 1},
        "checkpoint": {"keep_last": 2},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


if __name__ == "__main__":
    sys.exit(main())
