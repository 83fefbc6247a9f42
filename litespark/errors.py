"""What Litespark raises, and the exit code each kind of end has.

A mistake of the user (a misspelt key, a missing file, a degree that does not divide) is a
`UserError`: one message that names the place, says what is wrong with the value found there, and
what to type instead.  The command line prints it without a traceback and exits with 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `litespark` command."""

    DONE = 0
    FAILED = 1  # anything not listed here: a bug, a machine fault
    USER_ERROR = 2  # the user's input is wrong
    STOPPED_BY_SIGNAL = 3  # a signal asked for the stop; the state was saved first
    ENDED_BY_GUARD = 4  # a guard (NaN, hang) ended the run


class LitesparkError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the process ends with.

    `on_every_rank` says that all processes of the job raise it alike, so that one message will do.
    """

    exit_code: ExitCode = ExitCode.FAILED
    on_every_rank: bool = False


class UserError(LitesparkError):
    """The user's input is wrong.

    Args:
        where: the field with its value (`parallel.tensor = 3`) or the file and line (`a.jsonl:17`).
        problem: what is wrong with it, as a clause without a full stop.
        fix: what to type or do instead, as a sentence.
    """

    exit_code = ExitCode.USER_ERROR

    def __init__(self, where: str, problem: str, fix: str) -> None:
        self.where = where
        self.problem = problem
        self.fix = fix
        super().__init__(f"{where}: {problem}. {fix}")

    def __reduce__(self) -> tuple[object, ...]:
        """Processes send each other errors; an exception is otherwise rebuilt from its message."""
        return _rebuild, (type(self), self.args, self.__dict__)


class UserErrors(UserError):
    """Several mistakes reported at once, one line each; `errors` holds them."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = tuple(errors)
        LitesparkError.__init__(self, "\n".join(str(error) for error in self.errors))


def _rebuild(
    kind: type[UserError], args: tuple[object, ...], attributes: dict[str, object]
) -> UserError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


def raise_user_errors(errors: Sequence[UserError]) -> None:
    """Raise nothing, the one error, or all of them together.

    Raises:
        UserError: when `errors` is not empty.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(errors)


class GuardError(LitesparkError):
    """A guard ended the run; the message is the reason and stands in the last line printed."""

    exit_code = ExitCode.ENDED_BY_GUARD
    on_every_rank = True


class StoppedBySignal(LitesparkError):
    """A signal asked for the stop and the state has been saved."""

    exit_code = ExitCode.STOPPED_BY_SIGNAL
    on_every_rank = True


class MissingExtraError(UserError):
    """An optional package is needed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            where=needed_for,
            problem=f"the Python package '{package}' is not installed",
            fix=f"Install it with: pip install 'litespark[{extra}]'.",
        )
