"""One run at a time in a folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TextIO

from litespark.errors import UserError
from litespark.utils.locks import lock_file

PATIENCE_SECONDS = 10.0  # the ranks of a run that was just killed may still be ending


def lock_run_folder(folder: Path) -> TextIO:
    """Hold the run's folder for this process; closing the file, or the process's end, lets it go.

    Where the file system or the system has no locks, nothing is held.

    Raises:
        UserError: another process holds it.
    """
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held open on purpose
    if lock_file(file, PATIENCE_SECONDS, poll_seconds=0.2) == "busy":
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"run.output_dir = {folder}",
            f"another run is writing there ({holder or 'it did not say which'})",
            "Stop that run, or give another folder.",
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
