"""`gradient_accumulation_fusion` without apex's CUDA extension.

Without: `ColumnParallelLinear` and `RowParallelLinear` (`tensor_parallel/layers.py`) refuse the
option. One `addmm_` into `main_grad` does what the two functions of the extension do; inputs are
widened to the accumulator's type first, as the extension's GEMM accumulates in it.

Goes when: megatron-core ships a fallback.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from torch import Tensor


def _accumulate(input_: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    main_grad.addmm_(grad_output.t().to(main_grad.dtype), input_.to(main_grad.dtype))


def _apply() -> Undo:
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return replace_attributes()
    extension = SimpleNamespace(
        wgrad_gemm_accum_fp32=_accumulate, wgrad_gemm_accum_fp16=_accumulate
    )
    return replace_attributes(
        (layers, "fused_weight_gradient_mlp_cuda", extension),
        (layers, "_grad_accum_fusion_available", True),
    )


PATCH = Patch(
    name="wgrad_fusion",
    # The extension itself is no symbol to check: its absence is the reason for the patch.
    symbols=("megatron.core.tensor_parallel.layers._grad_accum_fusion_available",),
    versions=">=0.16.1,<0.17",
    condition=Condition.NO_TE,
    why="gradient_accumulation_fusion needs a CUDA extension of apex",
    remove_when="megatron-core ships a fallback",
    apply=_apply,
)
