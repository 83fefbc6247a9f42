"""What a check finds: fine, a warning, or wrong; what was seen; and what to type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["fine", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `fix` is empty where there is nothing to do."""

    name: str
    status: Status
    seen: str
    fix: str = ""


Check = Callable[[], Iterable[Finding]]


def fine(name: str, seen: str) -> Finding:
    """Nothing to do."""
    return Finding(name, "fine", seen)


def warning(name: str, seen: str, fix: str) -> Finding:
    """A run works, but slower or less safely than it could."""
    return Finding(name, "warning", seen, fix)


def wrong(name: str, seen: str, fix: str) -> Finding:
    """A run does not work, or computes something else."""
    return Finding(name, "wrong", seen, fix)


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """The findings of checks, one by one; a check that fails is a finding of its own."""
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a machine that lacks what the check reads must not end it
            words = str(error).splitlines()[0] if str(error) else ""
            yield warning(name, f"cannot be looked at ({type(error).__name__}: {words})", "")
