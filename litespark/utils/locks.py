"""Locks between the processes of a machine, which the system lets go when a process dies.

A lock is on an open file and lasts until that is closed.  Not every system has them, nor every file
system: each caller says what it does without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO, Any, Literal

# Held by this process; still held by another; not to be had on this system or file system.
LockOutcome = Literal["held", "busy", "none"]


def lock_file(
    file: IO[Any],
    patience_seconds: float,
    poll_seconds: float,
    on_wait: Callable[[], None] = lambda: None,
) -> LockOutcome:
    """Lock an open file for this process alone, waiting for another that holds it.

    Args:
        file: to be locked, until it is closed.
        patience_seconds: how long to wait at most.
        poll_seconds: between two tries.
        on_wait: called once, if there is anything to wait for.
    """
    try:
        import fcntl  # not on every system
    except ImportError:
        return "none"
    deadline = time.monotonic() + patience_seconds
    has_waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return "held"
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return "busy"
            if not has_waited:
                on_wait()
            has_waited = True
            time.sleep(poll_seconds)
        except OSError:  # no locks on this file system
            return "none"
