"""What one rank finds, all ranks hear of: none waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from litespark.errors import ExitCode, LitesparkError, UserError
from litespark.parallel.groups import gather_objects

T = TypeVar("T")


def on_all_ranks(check: Callable[[], T]) -> T:
    """Run a check on every rank; a mistake found by any is raised by all, so that none waits.

    Raises:
        LitesparkError: the mistake or fault of the lowest rank that found one.
    """
    result, error = None, None
    try:
        result = check()
    except Exception as found:  # whatever it is, the other ranks must not wait for this one
        error = found
    is_mistake = isinstance(error, UserError)
    outcomes = gather_objects(None if error is None else (is_mistake, str(error)))
    if error is not None and not is_mistake:
        raise error
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            is_mistake, message = outcome
            raise _Agreed(message) if is_mistake else LitesparkError(f"rank {rank}: {message}")
    return result  # type: ignore[return-value]


class _Agreed(LitesparkError):
    """A user's mistake whose message was made on some rank."""

    exit_code = ExitCode.USER_ERROR
    on_every_rank = True
