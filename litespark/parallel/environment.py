"""What the launcher says about this process, without importing torch."""

from __future__ import annotations

import os

from litespark.errors import UserError


def world_size_from_environment() -> int | None:
    """WORLD_SIZE as torchrun sets it, or None when no launcher started this process."""
    value = os.environ.get("WORLD_SIZE")
    return None if not value else integer_from_environment("WORLD_SIZE")


def integer_from_environment(name: str) -> int:
    """A launcher's variable as an integer.

    Raises:
        UserError: it is not set, or is no number.
    """
    value = os.environ.get(name)
    if value is None or not value.isdecimal():
        raise UserError(
            name if value is None else f"{name} = {value!r}",
            f"{'is not set' if value is None else 'is no number'}, and the launcher's other "
            "variables are set",
            "Start the processes with torchrun or with --nproc.",
        )
    return int(value)
