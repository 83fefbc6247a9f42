"""Processes: how many this machine lets us run at once, which run, and ending together."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process
from pathlib import Path


def available_cores() -> int:
    """Return how many cores this process may run on.

    A scheduler or a container often grants fewer than the machine has.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux, or it ended meanwhile
        return os.name != "posix" or not Path("/proc/self").exists()
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def prepare_worker() -> None:
    """Prepare this process, started by `multiprocessing` to do a part of its parent's work.

    It is deaf to Ctrl-C (the parent hears it), it is gone when the parent is, and its tokenizers
    use one thread, for the processes are the parallelism.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()


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
