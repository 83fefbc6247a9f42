"""The tracker of CUDA random states, which dropout and weight initialisation draw from.

Without: `model_parallel_cuda_manual_seed` fails (`tensor_parallel/random.py`).  On a CPU there is
one default generator; it plays the part of the CUDA one.  `CudaRNGStatesTracker.fork` is replaced
because the original warns at every use: it expects the CPU generator to stand still while the CUDA
one moves, and here they are the same.

Goes when: megatron-core's tracker accepts a generator of any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from litespark.errors import LitesparkError
from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from torch import Tensor

# The tracker keeps no entry for the state outside of any fork.
_OUTSIDE = "default-rng"


def _get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
    import torch

    return torch.get_rng_state()


def _set_state(new_state: Tensor, device: object = None, graph_safe: bool = False) -> None:
    import torch

    torch.set_rng_state(new_state)


@contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    if name not in self.states_:
        raise LitesparkError(
            f"random state {name!r} was never added. Call model_parallel_cuda_manual_seed first."
        )
    outer_name, outer_state = self._current_state_name, _get_state()
    if outer_name != _OUTSIDE:
        self.states_[outer_name] = outer_state
    _set_state(self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = _get_state()
        # A fork inside a fork of the same name moves that state on; the outer one must see it.
        _set_state(self.states_.get(outer_name, outer_state))
        self._current_state_name = outer_name


def _apply() -> Undo:
    import torch
    from megatron.core.tensor_parallel import random as mcore_random

    return replace_attributes(
        (torch.cuda, "get_rng_state", _get_state),
        (torch.cuda, "set_rng_state", _set_state),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (mcore_random, "_get_cuda_rng_state", _get_state),
        (mcore_random, "_set_cuda_rng_state", _set_state),
        (mcore_random.CudaRNGStatesTracker, "fork", _fork),
    )


PATCH = Patch(
    name="rng",
    symbols=(
        "torch.cuda.get_rng_state",
        "torch.cuda.set_rng_state",
        "torch.cuda.manual_seed",
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="random states are kept for CUDA generators only",
    remove_when="the tracker accepts a generator of any device",
    apply=_apply,
)
