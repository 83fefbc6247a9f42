"""Starts N processes of this machine through torch's elastic agent, and ends them together."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

from litespark.errors import ExitCode

LAUNCHER_VARIABLE = "LITESPARK_LAUNCHER_PID"
GRACE_SECONDS = 120  # for the last step and the checkpoint, after a signal


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m litespark ARGUMENTS` in `num_processes` ranks; returns the exit code.

    The first rank that fails decides the code; the others are ended.  A signal is passed on, and
    the ranks have time to save.
    """
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
    except SignalException:
        return ExitCode.STOPPED_BY_SIGNAL
    return ExitCode.DONE


def end_with_launcher() -> None:
    """Die when the launcher that started this process is gone.

    A launcher that is killed cannot stop its ranks; without this they would train on, unseen, and
    write into the folder of the run that was started in their place.
    """
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
