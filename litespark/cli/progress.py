"""A progress bar for work that is counted in bytes: on a terminal only, nothing in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class ByteBar:
    """`begin` sets the total in bytes, `advance` adds to it, `rename` changes the label."""

    begin: Callable[[int], None]
    advance: Callable[[int], None]
    rename: Callable[[str], None]


@contextmanager
def byte_bar(label: str) -> Iterator[ByteBar]:
    """Show a bar with the rate and the time left while the block runs."""
    if not sys.stderr.isatty():
        yield ByteBar(lambda total: None, lambda count: None, lambda text: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(label, total=None)
        yield ByteBar(
            lambda total: display.update(task, total=total, completed=0),
            lambda count: display.advance(task, count),
            lambda text: display.update(task, description=text),
        )
