"""A folder that takes long to write: it appears whole or not at all, and goes on after a kill.

Until all of it is on disk it is called `NAME.partial`, and a journal in it says which of its large
files are complete.  With `resume` those are kept; the others, and everything small, are written
again.  What is written depends on the source and the options alone, which the journal names too, so
the folder holds the same bytes whether it was made in one go or in ten.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from litespark.errors import LitesparkError, UserError
from litespark.utils.files import fsync_path, rename_durably, write_text_atomically
from litespark.utils.locks import lock_file

JOURNAL = "journal.json"
_LOCK = ".lock"
_SUFFIX = ".partial"
logger = logging.getLogger("litespark.hf")


@dataclass
class Staging:
    """The folder while it is written.

    Attributes:
        folder: where to write.
        task: what is written from what, as JSON values.
        done: what was said of each large file that is complete.
    """

    folder: Path
    task: Mapping[str, Any]
    done: dict[str, Any] = field(default_factory=dict)
    own_files = frozenset({JOURNAL, _LOCK})

    def record(self, name: str, value: Any) -> None:
        """Say that a file, forced to the disk, is complete; `value` comes back after a resume."""
        self.done[name] = value
        content = {"task": dict(self.task), "done": self.done}
        write_text_atomically(self.folder / JOURNAL, json.dumps(content) + "\n")


@contextmanager
def staged(final: Path, task: Mapping[str, Any], *, resume: bool) -> Iterator[Staging]:
    """A folder to write into, which becomes `final` when the block ends.

    If the block raises, it vanishes, unless some of its large files are complete already and the
    fault is not the input's: then it stays for `resume`.

    Args:
        final: must not exist, or be empty.
        task: what is written from what; only the same can be resumed.
        resume: go on with what an earlier attempt has left.

    Raises:
        UserError: `final` is taken or cannot be made; or an earlier attempt is there, and it is
            another's or was not asked for; or another process is at it.
        LitesparkError: the disk is full.
    """
    refuse_taken(final)
    final = Path(os.path.realpath(final))  # a link to an empty folder stays a link
    folder = final.with_name(final.name + _SUFFIX)
    staging = _open(folder, final, task, resume=resume)
    lock = _lock(folder)
    try:
        yield staging
        for name in staging.own_files:
            (folder / name).unlink(missing_ok=True)
        fsync_path(folder)
        rename_durably(folder, final)
    except OSError as error:
        kept = _keep_or_remove(staging)
        raise LitesparkError(f"{final}: writing failed, {kept} ({error})") from error
    except LitesparkError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        _keep_or_remove(staging)
        raise
    finally:
        lock.close()


def refuse_taken(folder: Path) -> None:
    """Refuse a folder in which something would be overwritten.

    Raises:
        UserError: `folder` holds something, or is a file.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise UserError(
            str(folder),
            "is not empty" if folder.is_dir() else "is a file",
            "Give a folder that does not exist yet.",
        )


def _open(folder: Path, final: Path, task: Mapping[str, Any], *, resume: bool) -> Staging:
    if (folder / JOURNAL).exists() and not resume:  # without it nothing in there is complete
        raise UserError(
            str(folder),
            "is left of an attempt that was cut short, or is being written",
            "Add --resume to go on with it, or delete it.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            str(final),
            f"cannot be made ({error.strerror})",
            "Give a folder in a place that can be written to.",
        ) from None
    return Staging(folder, task, _read_journal(folder, task))


def _read_journal(folder: Path, task: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / JOURNAL
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, done = content["task"], content["done"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            str(path), f"is not what was written ({error})", "Delete the folder."
        ) from None
    if found != json.loads(json.dumps(dict(task))):
        keys = [key for key in {**found, **task} if found.get(key) != task.get(key)]
        raise UserError(
            str(folder),
            f"is left of another task: {', '.join(keys)} differs",
            "Give the same source and options, or delete it.",
        )
    logger.info("going on with %s: %d files are complete", folder, len(done))
    return done


def _lock(folder: Path) -> IO[str]:
    lock = open(folder / _LOCK, "w")  # noqa: SIM115 - closed when the block ends
    if lock_file(lock, patience_seconds=0.0, poll_seconds=0.1) == "busy":
        lock.close()
        raise UserError(str(folder), "is being written by another process", "Wait for its end.")
    return lock


def _keep_or_remove(staging: Staging) -> str:
    if staging.done:
        return f"{staging.folder} keeps what is complete: --resume goes on"
    shutil.rmtree(staging.folder, ignore_errors=True)
    return "nothing was kept"
