"""How a command ends: one line on stderr for an expected error, and an exit code of its kind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from litespark.errors import ExitCode, LitesparkError

INTERRUPTED = 130  # 128 + SIGINT, what shells report for Ctrl-C
_FIRST_SPEAKS_SECONDS = 2.0


def unwind_on_sigterm() -> None:
    """Let a scheduler's SIGTERM end this process like an error, so that what is unfinished goes:
    temporary files, worker processes.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_command(function: Callable[[], int]) -> int:
    """Run a command's body and return the exit code of the process.

    An error raised on purpose (`LitesparkError`) is printed without a traceback as
    `litespark: error: MESSAGE`; Ctrl-C ends with 130; anything else is a bug and keeps its
    traceback.
    """
    try:
        return int(function())
    except LitesparkError as error:
        if os.environ.get("RANK", "0") == "0" or not error.on_every_rank:
            word = "stopped" if error.exit_code == ExitCode.STOPPED_BY_SIGNAL else "error"
            sys.stderr.write(f"litespark: {word}: {error}\n")
        else:
            # A launcher ends all ranks as soon as one is gone: the first must have spoken by then.
            time.sleep(_FIRST_SPEAKS_SECONDS)
        return int(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("litespark: interrupted\n")
        return INTERRUPTED
