"""Choices that were measured once and are kept on disk, for later runs and for other processes.

Whatever is chosen by timing (an attention library, an algorithm of a matrix product) is kept in one
JSON file of each kind under `~/.cache/litespark`: key -> value, the key naming the machine and the
versions for which the value holds.  Runs then start without timing, and take the same choice again,
so that they compute the same.

Several processes of a machine may measure the same key at the same time.  The first to write wins:
who comes later finds the value when it merges its own into the file, and takes it.  A lock beside
the file makes reading, merging and writing one step.  Where locks do not exist, a choice may be
lost to another process that writes at the same time; it is measured again then.

The file is a convenience: one that is damaged or cannot be written costs a warning and the time to
measure, never a run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from litespark.utils.files import write_text_atomically
from litespark.utils.locks import lock_file

PATIENCE_SECONDS = 5.0  # a write takes milliseconds: a longer holder was stopped, or is gone
_LOGGER = logging.getLogger(__name__)

T = TypeVar("T")


def cache_path(name: str) -> Path | None:
    """The file `name` of Litespark's folder in $XDG_CACHE_HOME or ~/.cache; None without a home."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "litespark" / name


class ChoiceCache:
    """One file of choices, read once and written when a choice is added.

    Values are whatever JSON holds.  Each caller parses its own: `parse` returns None for a value
    (or None, where there is none) that it cannot use, which is then replaced.

    Args:
        path: finds the file when it is needed; None where there is no place for one.
        title: what the choices are about, for messages.
    """

    def __init__(self, path: Callable[[], Path | None], title: str) -> None:
        self._path = path
        self._title = title
        self._content: dict[str, Any] | None = None
        self._has_complained = False

    def find(self, key: str, parse: Callable[[Any], T | None]) -> T | None:
        """The choice that is kept for the key; None without a usable one."""
        if self._content is None:
            self._content = self._read(self._path())
        return parse(self._content.get(key))

    def settle(self, key: str, value: Any, parse: Callable[[Any], T | None]) -> T | None:
        """Keep `value`, unless another process was first: its choice is returned, to be used."""
        path = self._path()
        earlier = None
        content = self._content or {}
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with _lock_beside(path):
                    content = self._read(path)
                    earlier = parse(content.get(key))
                    if earlier is None:
                        text = json.dumps(content | {key: value}, indent=1, sort_keys=True)
                        write_text_atomically(path, text)
        except OSError as error:
            self._complain(f"the choice is not kept for the next run: {error}")
        self._content = content if earlier is not None else content | {key: value}
        return earlier

    def _read(self, path: Path | None) -> dict[str, Any]:
        if path is None:
            return {}
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._complain(f"{path} cannot be read and is not used: {error}")
            return {}
        if not isinstance(content, dict):
            self._complain(f"{path} is not a file of choices and is not used")
            return {}
        return content

    def _complain(self, problem: str) -> None:
        """Warn, the first time."""
        if not self._has_complained:
            _LOGGER.warning("%s: %s", self._title, problem)
        self._has_complained = True


@contextmanager
def _lock_beside(path: Path) -> Iterator[None]:
    """Hold `path`.lock for the block; nothing where there are no locks or it cannot be had.

    It is a file of its own because `path` is replaced by each write, and a lock with it.
    """
    with ExitStack() as held:
        with suppress(OSError):  # writing tells what is wrong with the folder, if anything is
            file = held.enter_context(open(path.with_name(f"{path.name}.lock"), "ab"))
            lock_file(file, PATIENCE_SECONDS, poll_seconds=0.005)
        yield
