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

from litespark.checkpoint.folder import newest_checkpoint
from litespark.errors import ExitCode

LAUNCHER_VARIABLE = "LITESPARK_LAUNCHER_PID"
# SIGTERM and SIGUSR1: preemption. SIGHUP: the terminal was closed. SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE_SECONDS = 120  # for the last step and the checkpoint, after a signal


def launch(
    num_processes: int, arguments: Sequence[str], run_folder: Path, *, max_restarts: int = 0
) -> int:
    """Run `python -m litespark ARGUMENTS` in `num_processes` ranks; returns the exit code.

    The first rank that fails decides the code; the others are ended.  After a fault (a lost rank, a
    hang; not a mistake of the user's, nor a guard that would end the run again) all are started
    again, up to `max_restarts` times, and resume from the newest checkpoint.  A signal is passed
    on, and the ranks have time to save; the run's events.jsonl says whether they did.
    """
    events = run_folder / "events.jsonl"
    restarts = 0
    while True:
        started = time.time()
        code, reason = _launch_once(num_processes, arguments, events)
        if reason:
            sys.stderr.write(f"litespark: error: {reason}\n")
        hangs = code == ExitCode.ENDED_BY_GUARD and ended_with("hang", events, started)
        is_fault = code == ExitCode.FAILED or hangs
        if not is_fault or restarts == max_restarts:
            return code
        restarts += 1
        sys.stderr.write(f"litespark: restart {restarts} of {max_restarts}\n")
        if newest_checkpoint(run_folder / "checkpoints") is not None:
            # Wherever the first start began, this run has a state of its own by now.
            arguments = [*arguments, "run.resume=auto"]


def _launch_once(num_processes: int, arguments: Sequence[str], events: Path) -> tuple[int, str]:
    """The exit code, and what to say of it where no rank could."""
    started = time.time()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    prepare_agent()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="litespark",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle=os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"],
    )
    try:
        elastic_launch(config, sys.executable)("-m", "litespark", *arguments)
    except ChildFailedError as error:
        if ended_with("hang", events, started):
            return ExitCode.ENDED_BY_GUARD, ""
        rank, failure = error.get_first_failure()
        if failure.exitcode not in set(ExitCode):
            return ExitCode.FAILED, f"rank {rank} {how_it_ended(failure.exitcode)}"
        return failure.exitcode, ""
    except SignalException as error:
        return code_after_signal(error.sigval, events, started), ""
    return ExitCode.DONE, ""


def prepare_agent() -> None:
    """Set what torch's agent reads from the environment, and silence its own log.

    Each rank says what went wrong itself; the agent's log would bury it.
    """
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(GRACE_SECONDS)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in SIGNALS)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def code_after_signal(number: int, events: Path, started: float) -> int:
    """The exit code after a signal was passed on to the ranks: did they save?"""
    if ended_with("stopped", events, started):
        return ExitCode.STOPPED_BY_SIGNAL
    name = signal.Signals(number).name
    sys.stderr.write(f"litespark: error: ended by {name} before a state was saved\n")
    return 128 + number


def how_it_ended(exit_code: int) -> str:
    """An exit code, or the signal that it stands for, in words."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = "; the kernel does so when memory runs out, see dmesg" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def ended_with(event: str, events: Path, started: float) -> bool:
    """Whether the last thing that the run wrote since then is this event."""
    try:
        last = json.loads(events.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    return last["event"] == event and last["time"] >= started


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
