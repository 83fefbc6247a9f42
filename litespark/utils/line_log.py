"""A file of lines that grows during a run, and outlives a disk that is full for a while."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class LineLog:
    """Appends whole lines; those that the disk refuses are kept, and written before the next one.

    A log is no reason to end a run of weeks: the first refusal is said, and the run goes on.

    Raises:
        OSError: when the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._size_bytes = os.fstat(self._file.fileno()).st_size
        self._waiting = b""
        self._is_told = False

    def write(self, line: str) -> None:
        """Append one line, given without its end."""
        self._waiting += line.encode() + b"\n"
        self._write_waiting()

    def close(self) -> None:
        """Write what waits, if the disk takes it now, and close."""
        if not self._file.closed:
            if self._waiting:
                self._write_waiting()
            self._file.close()

    def _write_waiting(self) -> None:
        left = self._waiting
        try:
            while left:  # a disk with a little room takes a part, and refuses the rest
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(self._size_bytes)  # no torn line for a later one to continue
            if not self._is_told:
                logger.warning(
                    "%s cannot be written (%s); its lines are kept for when it can",
                    self.path,
                    error.strerror,
                )
            self._is_told = True
            return
        self._size_bytes += len(self._waiting)
        self._waiting, self._is_told = b"", False
