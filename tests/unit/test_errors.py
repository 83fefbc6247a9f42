"""Errors keep their message and parts when one process sends them to another."""

from __future__ import annotations

import pickle

import pytest

from litespark.errors import (
    ExitCode,
    GuardError,
    MissingExtraError,
    UserError,
    UserErrors,
    raise_user_errors,
)

ONE = UserError("a = 1", "is wrong", "Mend it.")


@pytest.mark.parametrize(
    "error", [ONE, UserErrors([ONE, ONE]), MissingExtraError("wandb", "wandb", "logging")]
)
def test_pickled_and_back(error):
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
    assert str(back) == str(error)
    assert type(back) is type(error)
    assert vars(back).keys() == vars(error).keys()


def test_message_has_place_problem_and_fix():
    assert str(ONE) == "a = 1: is wrong. Mend it."


def test_one_and_many():
    raise_user_errors([])
    with pytest.raises(UserError, match=r"^a = 1: is wrong\. Mend it\.$"):
        raise_user_errors([ONE])
    with pytest.raises(UserErrors) as caught:
        raise_user_errors([ONE, ONE])
    assert len(str(caught.value).splitlines()) == 2


def test_exit_codes_are_those_of_the_design():
    assert (UserError.exit_code, GuardError.exit_code) == (2, 4)
    assert [int(code) for code in ExitCode] == [0, 1, 2, 3, 4]
