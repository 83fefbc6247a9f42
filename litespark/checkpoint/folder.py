"""Names of checkpoints, which one is the newest, which are deleted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from litespark.checkpoint.run_state import FILE_NAME
from litespark.errors import UserError
from litespark.utils.files import write_text_atomically

LATEST = "latest"
STATE = "state"
CONFIG = "config.yaml"
_REPLACED = ".replaced"
_NAME = re.compile(r"step_(\d{9,})")


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:09d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints in order of their steps.

    A checkpoint gets its name by a rename when all of it is on disk, so the name is the proof.
    """
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, or the last step's if a crash came before it was moved.

    The two differ after a roll-back to an earlier step.
    """
    complete = complete_checkpoints(checkpoints)
    try:
        named = checkpoints / (checkpoints / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = None
    if named in complete:
        return named
    return complete[-1] if complete else None


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
        if int(path.name.removeprefix("step_")) > step:
            aside = path.with_name(f"rolled_back_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def prune_checkpoints(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` complete checkpoints."""
    for path in complete_checkpoints(checkpoints)[:-keep_last]:
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
