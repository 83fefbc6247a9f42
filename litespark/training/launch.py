"""Starts N processes of this machine through torch's elastic agent, and ends them together."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from litespark.errors import ExitCode

LAUNCHER_VARIABLE = "LITESPARK_LAUNCHER_PID"
# SIGTERM and SIGUSR1: preemption. SIGHUP: the terminal was closed. SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE_SECONDS = 120  # for the last step and the checkpoint, after a signal


def launch(num_processes: int, arguments: Sequence[str], events: Path) -> int:
    """Run `python -m litespark ARGUMENTS` in `num_processes` ranks; returns the exit code.

    The first rank that fails decides the code; the others are ended.  A signal is passed on, and
    the ranks have time to save; `events` is the run's events.jsonl, which says whether they did.
    """
    started = time.time()
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE_SECONDS)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each rank says what went wrong itself; the agent's own log would bury it.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="litespark",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in SIGNALS),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "litespark", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in set(ExitCode):
            sys.stderr.write(
                f"litespark: error: rank {rank} ended with exit code {failure.exitcode}\n"
            )
            return ExitCode.FAILED
        return failure.exitcode
    except SignalException as error:
        if _stopped_after(events, started):
            return ExitCode.STOPPED_BY_SIGNAL
        name = signal.Signals(error.sigval).name
        sys.stderr.write(f"litespark: error: ended by {name} before a state was saved\n")
        return 128 + error.sigval
    return ExitCode.DONE


def _stopped_after(events: Path, started: float) -> bool:
    """Whether the run wrote, since then, that it has saved its state and stopped."""
    try:
        last = json.loads(events.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    return last["event"] == "stopped" and last["time"] >= started


def end_with_launcher() -> None:
    """Die when the launcher that started this process is gone.

    A launcher that is killed cannot stop its ranks; without this they would train on, unseen, and
    write into the folder of the run that was started in their place.
    """
    # Removed, so that a litespark which this process starts is not taken for a rank.
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def end_at_once_until_ready() -> None:
    """Let Ctrl-C end a rank that is still starting, without a traceback from within an import.

    Python's own handler raises KeyboardInterrupt wherever the process is, and an import that
    swallows it would leave this rank waiting for the others; the launcher speaks for all.
    """
    if LAUNCHER_VARIABLE in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
