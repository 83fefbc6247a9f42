"""Kill ranks at random moments of training and saving, again and again, and look at what is left.

    python -m tools.soak.kills --kills 200 --out /tmp/kills

Each round starts a run on 1, 2 or 4 processes (CPU), sends SIGKILL to a random rank at a random
moment, ends the others as a launcher would, and checks the folder: every checkpoint with a name is
whole, byte for byte (0 unreadable); none that was announced and not pruned is gone, and the next
start resumes from the newest (0 steps lost).  A run that has come to its end by way of its kills
must have the losses and the last checkpoint of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from litespark.checkpoint.folder import checkpoint_name, complete_checkpoints, newest_checkpoint
from litespark.checkpoint.integrity import share_faults
from tools.soak.trial import LAYOUTS, Trial, events, losses, shards, write_trial

SETTLE_SECONDS = 5.0  # the others have so long to end by themselves
KEEP_LAST = 3


@dataclass
class Tally:
    """What was seen so far."""

    kills: int = 0
    kills_while_saving: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)
    by_processes: Counter[int] = field(default_factory=Counter)


def main(arguments: list[str] | None = None) -> int:
    """Run the trial; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=40, help="of a run (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--minutes", type=float, help="stop after this long, if not done")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], choices=sorted(LAYOUTS)
    )
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    generator, tally = random.Random(args.seed), Tally()
    config = write_trial(args.out, args.steps, KEEP_LAST)
    trials = [
        Trial(config, processes, tuple(overrides))
        for processes in args.processes
        for overrides in LAYOUTS[processes]
    ]
    while tally.kills < args.kills and time.monotonic() < deadline:
        trial = trials[tally.runs % len(trials)]
        tally.runs += 1
        one_run(trial, args, generator, tally, deadline)
    by_processes = ", ".join(f"{n} on {p} processes" for p, n in sorted(tally.by_processes.items()))
    print(
        f"{tally.kills} kills ({by_processes}; {tally.kills_while_saving} with a checkpoint half "
        f"written), {tally.runs} runs, {len(tally.faults)} faults"
    )
    return 1 if tally.faults else 0


def one_run(
    trial: Trial,
    args: argparse.Namespace,
    generator: random.Random,
    tally: Tally,
    deadline: float,
) -> None:
    """Kill one run until it has come to its end, and compare it with one that was left alone."""
    whole = args.out / f"whole_{trials_name(trial)}"
    if not whole.exists():
        started = time.monotonic()
        finish(trial.start(whole), tally, "the undisturbed run")
        print(f"{trials_name(trial)}: {time.monotonic() - started:.1f} s undisturbed", flush=True)
    folder = args.out / f"run_{tally.runs}"
    shutil.rmtree(folder, ignore_errors=True)
    last = checkpoint_name(args.steps)
    while tally.kills < args.kills and time.monotonic() < deadline:
        ranks = trial.start(folder)
        seen = len([event for event in events(folder) if event["event"] == "checkpoint"])
        # Most kills fall after the first new checkpoint, at any point of a step and of a save.
        wait_for_checkpoint(folder, seen + generator.randrange(3), ranks)
        time.sleep(generator.uniform(0, 0.4))
        if not all(rank.is_alive() for rank in ranks):
            break
        generator.choice(ranks).kill()
        tally.kills += 1
        tally.by_processes[trial.processes] += 1
        end(ranks)
        tally.kills_while_saving += any((folder / "checkpoints").glob(".step_*.writing"))
        inspect(folder, tally)
        if (folder / "checkpoints" / last).exists():
            break
    finish(trial.start(folder), tally, folder.name)
    check_end(folder, whole, last, tally)


def trials_name(trial: Trial) -> str:
    """Short name of a layout."""
    return "_".join([str(trial.processes), *(o.removeprefix("parallel.") for o in trial.overrides)])


def wait_for_checkpoint(folder: Path, number: int, ranks: list[BaseProcess]) -> None:
    """Until that many checkpoints were announced, a rank has ended, or 30 s are over."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and all(rank.is_alive() for rank in ranks):
        if len([each for each in events(folder) if each["event"] == "checkpoint"]) > number:
            return
        time.sleep(0.02)


def end(ranks: list[BaseProcess]) -> None:
    """What a launcher does when a rank is gone: give the others a moment, then kill them."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        alive = [rank.sentinel for rank in ranks if rank.is_alive()]
        wait(alive, timeout=max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.kill()
        rank.join()


def finish(ranks: list[BaseProcess], tally: Tally, what: str) -> None:
    """Wait for the ranks to come to their end."""
    for rank in ranks:
        rank.join(300)
    if any(rank.exitcode != 0 for rank in ranks):
        fault(tally, f"{what} ended with {[rank.exitcode for rank in ranks]}")
        for rank in ranks:
            rank.kill()


def inspect(folder: Path, tally: Tally) -> None:
    """Every checkpoint with a name is whole, and the newest announced one is still there."""
    checkpoints = folder / "checkpoints"
    found = complete_checkpoints(checkpoints)
    for checkpoint in found:
        faults = share_faults(checkpoint)
        if faults:
            fault(tally, f"unreadable: {faults}")
    said = [event["step"] for event in events(folder) if event["event"] == "checkpoint"]
    newest = newest_checkpoint(checkpoints)
    newest_step = int(newest.name.removeprefix("step_")) if newest else 0
    if newest_step < max(said, default=0):
        fault(tally, f"step {max(said)} was saved, and the newest is {newest_step}")
    if newest is not None and newest != found[-1]:
        fault(tally, f"{found[-1].name} is complete, and {newest.name} would be resumed")


def check_end(folder: Path, whole: Path, last: str, tally: Tally) -> None:
    """The same losses and the same last state as the run that was left alone."""
    resumed = [event["step"] for event in events(folder) if event["event"] == "resumed"]
    if resumed != sorted(resumed):
        fault(tally, f"{folder.name} went back: {resumed}")
    if losses(whole) != losses(folder):
        fault(tally, f"{folder.name}: other losses than the undisturbed run")
    ours = shards(folder / "checkpoints" / last)
    if not ours or ours != shards(whole / "checkpoints" / last):
        fault(tally, f"{folder.name}: another last state than the undisturbed run")
    print(f"{folder.name}: resumed at {resumed}, {tally.kills} kills so far", flush=True)


def fault(tally: Tally, text: str) -> None:
    """Note what went wrong and say it at once."""
    tally.faults.append(text)
    print(f"FAULT {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
