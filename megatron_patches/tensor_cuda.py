"""`tensor.cuda()` in the middle of computations.

Without: tied embeddings with pipeline parallelism fail in `models/common/language_module`, saving a
`fully_reshardable` optimizer state in `optimizer/distrib_optimizer.py`, the parameter hash check in
`utils.py`.  On a machine without CUDA the tensor already is where it has to be.

Goes when: megatron-core moves tensors to its own device instead of to CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from torch import Tensor


def _stay(self: Tensor, *args: object, **kwargs: object) -> Tensor:
    return self


def _apply() -> Undo:
    import torch

    return replace_attributes((torch.Tensor, "cuda", _stay))


PATCH = Patch(
    name="tensor_cuda",
    symbols=("torch.Tensor.cuda",),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="tied embeddings and optimizer checkpoints call tensor.cuda()",
    remove_when="megatron-core moves tensors to its own device",
    apply=_apply,
)
