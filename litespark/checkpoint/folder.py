"""Names of checkpoints, which one is the newest, which are deleted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Container, Iterable
from pathlib import Path

from litespark.checkpoint.integrity import MARKER
from litespark.checkpoint.run_state import FILE_NAME
from litespark.errors import UserError
from litespark.utils.files import write_text_atomically

LATEST = "latest"
STATE = "state"
RANDOM = "random"
CONFIG = "config.yaml"
_REPLACED = ".replaced"
_NAME = re.compile(r"step_(\d{9,})")


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:09d}"


def random_states_file(rank: int) -> str:
    """Path in a checkpoint of the states of one rank's random generators."""
    return f"{RANDOM}/rank_{rank:06d}.json"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def parse_step(name: str) -> int | None:
    """The step in the name of a checkpoint's folder, None of any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints in order of their steps.

    A checkpoint gets its name by a rename when all of it is on disk, so the name is the proof.
    """
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The first of `newest_first`."""
    return next(iter(newest_first(checkpoints)), None)


def newest_first(checkpoints: Path) -> list[Path]:
    """Complete checkpoints in the order in which a run would resume from them.

    First the one that `latest` names, whose steps may not be the most: people roll back by
    editing it.  But when `latest` is older than the last step's checkpoint, a crash came before
    it was moved, or the disk was full, and the last step's is the first.
    """
    complete = complete_checkpoints(checkpoints)[::-1]
    latest = checkpoints / LATEST
    try:
        named = checkpoints / latest.read_text(encoding="utf-8").strip()
        if named in complete and not _is_older(latest, complete[0] / MARKER):
            return complete[complete.index(named) :]
    except (OSError, ValueError):
        pass
    return complete


def _is_older(path: Path, other: Path) -> bool:
    return other.exists() and path.stat().st_mtime_ns < other.stat().st_mtime_ns


def publish_checkpoint(temporary: Path, checkpoints: Path, step: int) -> Path:
    """Give a complete checkpoint its name and move `latest` to it; only the first rank calls.

    A checkpoint of the same step, left by a run that was rolled back, is replaced.
    """
    final = checkpoints / checkpoint_name(step)
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    write_text_atomically(checkpoints / LATEST, final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a killed run left half-written or half-deleted.

    A checkpoint that was to be replaced comes back if the kill came before its successor had the
    name.
    """
    for path in checkpoints.glob(".step_*"):
        final = checkpoints / path.name.removeprefix(".").removesuffix(_REPLACED)
        if path.name.endswith(_REPLACED) and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def set_aside_later(checkpoints: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than a run was rolled back to; their new names.

    They stay on disk, but are no longer what a restart resumes from.
    """
    moved = []
    for path in complete_checkpoints(checkpoints):
        if step_of(path) > step:
            aside = path.with_name(f"rolled_back_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def prune_steps(steps: Iterable[int], keep_last: int, keep_every: int | None) -> set[int]:
    """Steps whose checkpoints go: neither of the newest nor multiples of `keep_every`."""
    older = sorted(steps)[:-keep_last]
    return {step for step in older if keep_every is None or step % keep_every}


def prune_checkpoints(
    checkpoints: Path,
    keep_last: int,
    keep_every: int | None = None,
    spared: Container[str] = (),
) -> None:
    """Delete all but the newest `keep_last` complete checkpoints and each `keep_every`th step's.

    `spared` are names of further ones that stay this time.
    """
    found = complete_checkpoints(checkpoints)
    doomed_steps = prune_steps(map(step_of, found), keep_last, keep_every)
    for path in found:
        if step_of(path) not in doomed_steps or path.name in spared:
            continue
        # The name goes first: a deletion that is cut short must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}.deleting")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user means by a checkpoint, a `checkpoints` folder or a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / FILE_NAME).is_file():
        return path
    for folder in (path / "checkpoints", path):
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest
    raise UserError(
        str(path), "holds no complete checkpoint", "Give a run's folder or a step_... folder."
    )
