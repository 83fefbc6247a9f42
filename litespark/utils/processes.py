"""Processes: how many this machine lets us run at once, and ending together."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process


def available_cores() -> int:
    """Return how many cores this process may run on.

    A scheduler or a container often grants fewer than the machine has.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Let this process, started by `multiprocessing`, end when the one that started it is gone.

    A parent that is killed outright cannot end its children; without this they would wait for ever
    and hold its output pipes open.
    """

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
