"""Selective recompute of norms without Transformer Engine.

Without: `recompute_modules=["layernorm"]` fails with a NameError on `FP8GlobalStateManager`.
`CheckpointWithoutOutput` (`tensor_parallel/random.py`) is passed `fp8=False` but asks whether it is
`None`, so it believes that fp8 is on.

Goes when: the constructor tests the value instead of comparing with `None`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput


def _apply() -> Undo:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    original: Callable[..., None] = CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def init(self: CheckpointWithoutOutput, fp8: Any = False) -> None:
        original(self, fp8 or None)

    return replace_attributes((CheckpointWithoutOutput, "__init__", init))


PATCH = Patch(
    name="recompute_without_te",
    symbols=("megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",),
    versions=">=0.16.1,<0.17",
    condition=Condition.NO_TE,
    why="recompute of norms takes fp8=False for fp8 being on",
    remove_when="CheckpointWithoutOutput tests the value of fp8",
    apply=_apply,
)
