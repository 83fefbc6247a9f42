"""A hundred damaged checkpoints: each has to be named, and none loaded.

    python -m tools.soak.damage --out /tmp/damage --table damage.md

A run on 2 processes leaves checkpoints of steps 1 and 2.  Each trial copies both and damages one
file of step 2: truncates it, flips one bit, deletes it, swaps it with another of its kind, or puts
the one of step 1 in its place; every kind of file in turn.  Then what a resume does is done: the
newest whole checkpoint must be that of step 1, and the log must name the file of step 2; asked for
by its path, step 2 must be refused, and the error name the file.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from litespark.checkpoint.choose import newest_whole
from litespark.checkpoint.folder import checkpoint_name, newest_first
from litespark.checkpoint.integrity import DamagedCheckpoint
from litespark.parallel.groups import start_process_group, stop_process_group
from tools.soak.trial import Trial, write_trial

OLDER, NEWER = checkpoint_name(1), checkpoint_name(2)
# Every kind of file, and another one of its kind to swap it with, if there is.
KINDS = {
    "state/__0_0.distcp": "state/__0_1.distcp",
    "state/__1_0.distcp": "state/__0_0.distcp",
    "state/.metadata": None,
    "state/metadata.json": None,
    "state/common.pt": None,
    "random/rank_000000.json": "random/rank_000001.json",
    "run_state.json": None,
    "config.yaml": None,
    "complete.json": None,
}


@dataclass(frozen=True)
class Damage:
    """What is done to which file of the newer checkpoint."""

    how: str
    name: str

    def do(self, checkpoints: Path, generator: random.Random) -> None:
        """Damage the file."""
        path = checkpoints / NEWER / self.name
        content = bytearray(path.read_bytes())
        if self.how == "truncate":
            os.truncate(path, generator.randrange(len(content)))
        elif self.how == "flip a bit":
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
        elif self.how == "delete":
            path.unlink()
        elif self.how == "swap":
            other = checkpoints / NEWER / str(KINDS[self.name])
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        else:
            shutil.copyfile(checkpoints / OLDER / self.name, path)


def damages(checkpoints: Path) -> Iterator[Damage]:
    """All there are, over and over: bits and lengths differ from round to round."""
    kinds: list[Damage] = []
    for name, other in KINDS.items():
        kinds += [Damage(how, name) for how in ("truncate", "flip a bit", "delete")]
        files = [checkpoints / step / name for step in (OLDER, NEWER)]
        if files[0].read_bytes() != files[1].read_bytes():
            kinds.append(Damage("of another step", name))
        if other is not None:
            kinds.append(Damage("swap", name))
    return itertools.cycle(kinds)


class Said(logging.Handler):
    """What the choice of a checkpoint logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.lines.append(record.getMessage())


def fault_of(checkpoints: Path, damage: Damage) -> str:
    """What is wrong with how a damaged checkpoint is met; nothing if it is named and refused."""
    said, logger = Said(), logging.getLogger("litespark.checkpoint")
    path = str(checkpoints / NEWER / damage.name)
    logger.addHandler(said)
    try:
        chosen = newest_whole(newest_first(checkpoints), verify=True)
    finally:
        logger.removeHandler(said)
    if chosen != checkpoints / OLDER:
        return f"{chosen} would be loaded"
    if not any(NEWER in line and path in line for line in said.lines):
        return f"not named in {said.lines}"
    try:
        newest_whole([checkpoints / NEWER], verify=True)
    except DamagedCheckpoint as error:
        return "" if path in str(error) else f"not named in {error}"
    return "loaded when asked for by its path"


def try_all(
    whole: Path, out: Path, count: int, seed: int, report: Callable[[str], None] = print
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Damage copies of a folder of checkpoints; how often what was done, and the faults.

    A process group must be there, as the ranks of a run agree on what they found.
    """
    generator, done, faults = random.Random(seed), Counter[tuple[str, str]](), []
    for damage in itertools.islice(damages(whole), count):
        copy = out / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        damage.do(copy, generator)
        done[damage.name, damage.how] += 1
        fault = fault_of(copy, damage)
        if fault:
            faults.append(f"{damage.how} {damage.name}: {fault}")
            report(f"FAULT {faults[-1]}")
    return done, faults


def main(arguments: list[str] | None = None) -> int:
    """Run the trial; 0 when every damage was named and nothing damaged was loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of bits and lengths (default: 0)")
    parser.add_argument("--table", type=Path, help="write the result here, as Markdown")
    args = parser.parse_args(arguments)
    shutil.rmtree(args.out / "run", ignore_errors=True)
    ranks = Trial(write_trial(args.out, 2, 2), 2, ("parallel.tensor=2",)).start(args.out / "run")
    for rank in ranks:
        rank.join()
    start_process_group(60)
    try:
        done, faults = try_all(args.out / "run" / "checkpoints", args.out, args.count, args.seed)
    finally:
        stop_process_group()
    total = sum(done.values())
    summary = f"{total} damaged checkpoints: {total - len(faults)} named and refused"
    print(summary)
    if args.table is not None:
        ways = sorted({how for _, how in done})
        lines = [
            "| " + " | ".join([name, *(str(done.get((name, how), "")) for how in ways)]) + " |"
            for name in KINDS
        ]
        head = "| " + " | ".join(["file", *ways]) + " |\n|---" + "|--:" * len(ways) + "|"
        args.table.write_text("\n".join([summary, "", head, *lines, *faults]) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
