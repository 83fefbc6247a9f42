"""Files of lines that grow during a run, on a disk that may be full for a while."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

logger = logging.getLogger(__name__)


def append_whole(file: FileIO, data: bytes) -> None:
    """Append all of `data` to a file that was opened with `open(path, "ab", buffering=0)`, or none.

    Raises:
        OSError: when the disk refuses a part; what it took is cut off, for a torn line would be
            continued by the next one.
    """
    before_bytes = os.fstat(file.fileno()).st_size
    try:
        while data:  # a disk with a little room takes a part, and refuses the rest
            data = data[file.write(data) :]
    except OSError:
        file.truncate(before_bytes)
        raise


class LineLog:
    """Appends whole lines; those that the disk refuses are kept, and written before the next one.

    A log is no reason to end a run of weeks: the first refusal is said, and the run goes on.

    Raises:
        OSError: when the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._waiting = b""

    def write(self, line: str) -> None:
        """Append one line, given without its end."""
        is_first_refusal = not self._waiting
        self._waiting += line.encode() + b"\n"
        try:
            append_whole(self._file, self._waiting)
        except OSError as error:
            if is_first_refusal:
                logger.warning(
                    "%s cannot be written (%s); its lines are kept for when it can",
                    self.path,
                    error.strerror,
                )
            return
        self._waiting = b""

    def close(self) -> None:
        """Write what waits, if the disk takes it now, and close."""
        if not self._file.closed:
            with suppress(OSError):  # told when it was refused
                append_whole(self._file, self._waiting)
            self._file.close()
