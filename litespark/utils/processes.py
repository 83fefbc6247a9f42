"""Processes that end together."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process


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
