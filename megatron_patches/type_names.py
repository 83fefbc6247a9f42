"""Tests on the name of a tensor's type, such as `param.type() == "torch.cuda.FloatTensor"`.

Without: gradient clipping fails an assertion (`optimizer/clip_grads.py`), and the mixed precision
and distributed optimizers refuse every parameter when they are built.  `Tensor.type()` of a CPU
tensor answers with the CUDA name while one of those three functions runs, and nowhere else.

Goes when: megatron-core compares `dtype` instead of type names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from torch import Tensor

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


@contextmanager
def _cuda_type_names() -> Iterator[None]:
    import torch

    real_type = torch.Tensor.type

    def cuda_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        # With arguments it is a conversion, not a question.
        asked_for_name = not args and not kwargs
        return answer.replace("torch.", "torch.cuda.", 1) if asked_for_name else answer

    undo = replace_attributes((torch.Tensor, "type", cuda_type))
    try:
        yield
    finally:
        undo()


def _with_cuda_type_names(function: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
    @functools.wraps(function)
    def call(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


def _apply() -> Undo:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    distributed = distrib_optimizer.DistributedOptimizer
    float16 = optimizer.Float16OptimizerWithFloat16Params
    return replace_attributes(
        (clip_grads, "clip_grad_by_total_norm_fp32", clip),
        (optimizer, "clip_grad_by_total_norm_fp32", clip),
        (distributed, "__init__", _with_cuda_type_names(distributed.__init__)),
        (float16, "__init__", _with_cuda_type_names(float16.__init__)),
    )


PATCH = Patch(
    name="type_names",
    symbols=(
        "megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32",
        "megatron.core.optimizer.optimizer.clip_grad_by_total_norm_fp32",
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.__init__",
        "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="optimizers and clipping accept only tensors whose type is named torch.cuda.*",
    remove_when="megatron-core compares dtypes instead of type names",
    apply=_apply,
)
