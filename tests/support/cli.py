"""Runs the `litespark` command in a process of its own, as a user would type it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """The environment without a launcher's variables, which would make the command a rank."""
    launcher = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    return {key: value for key, value in os.environ.items() if key not in launcher}


# What ends a command that hangs, on the slowest machine; it measures nothing.
PATIENCE_SECONDS = 500


_started: list[subprocess.Popen[str]] = []


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start `litespark ARGUMENTS` with more environment variables; both outputs are captured.

    A command that outlives its test is killed (`end_all`), and its ranks with it.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "litespark", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | variables,
        cwd=ROOT,
    )
    _started.append(process)
    return process


def end_all() -> None:
    """Kill what `start` has started and a test has left, because it failed before the end."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a frozen rank may hold the pipe
                process.communicate(timeout=10)


def run(
    *arguments: str, timeout_seconds: float = PATIENCE_SECONDS, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `litespark ARGUMENTS` to its end."""
    process = start(*arguments, **variables)
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
