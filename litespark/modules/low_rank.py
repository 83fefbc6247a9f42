"""Low-rank adapters: W + scale B A with W frozen (Hu et al. 2021, arXiv 2106.09685, section 4.1).

The sum is formed once a micro-batch, before the product with the activations, and takes the
weight's
place: y = x (W + s B A)^T.  So a fused block, in BF16 or FP8, computes as it does without adapters,
training computes with the very weights that an export merges, and autograd turns the weight's
gradient G into those of the two matrices, dB = s G A^T and dA = s B^T G.  Compared with x A^T B^T
beside the product it saves nothing in the weight's gradient, which full training computes as well;
what it saves is the memory that adapters are for: gradients and optimizer state of W.  In BF16 the
sum is rounded as a weight of full training is, whose masters are fp32 as those of A and B are.

Tensor parallelism: a column-parallel weight [n/tp, k] has its own rows of B and the whole A, a
row-parallel one [n, k/tp] its own columns of A and the whole B.  The gradient of the whole one is
summed over the ranks.

Shapes: r rank, n and k rows and columns of this rank's part of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from litespark.config.post_training import LoraConfig

ADAPTER = "adapter"
A_NAME, B_NAME = "lora_a", "lora_b"


class Adapter(torch.nn.Module):
    """A and B of one linear.

    Args:
        weight_nk: this rank's part of the weight, frozen from now on.
        lora: rank and scale.
        split_axis: which axis of the weight is split over `group`.
    """

    def __init__(
        self, weight_nk: torch.nn.Parameter, lora: LoraConfig, split_axis: int, group: ProcessGroup
    ) -> None:
        super().__init__()
        rows, columns = weight_nk.shape
        self.scale = lora.scale
        self.is_enabled = True
        self.lora_a = torch.nn.Parameter(weight_nk.new_zeros(lora.rank, columns))
        self.lora_b = torch.nn.Parameter(weight_nk.new_zeros(rows, lora.rank))
        self._split_axis, self._group = split_axis, group
        stride = getattr(weight_nk, "partition_stride", 1)
        split = self.lora_b if split_axis == 0 else self.lora_a
        set_tensor_model_parallel_attributes(split, True, split_axis, stride)
        weight_nk.requires_grad_(False)

    def added_to(self, weight_nk: Tensor) -> Tensor:
        """W + scale B A, [n, k] in the weight's dtype."""
        if not self.is_enabled:
            return weight_nk
        a_rk: Any = self.lora_a
        b_nr: Any = self.lora_b
        if self._split_axis == 0:
            a_rk = copy_to_tensor_model_parallel_region(a_rk, group=self._group)
        else:
            b_nr = copy_to_tensor_model_parallel_region(b_nr, group=self._group)
        return torch.addmm(weight_nk, b_nr, a_rk, alpha=self.scale)


def adapted_weight(linear: Any) -> Any:
    """A linear's weight with its adapter, if it has one."""
    adapter = getattr(linear, ADAPTER, None)
    return linear.weight if adapter is None else adapter.added_to(linear.weight)


class _Adapted:
    """What the two parallel linears below have in common; `lora` is set by `with_adapters`."""

    lora: LoraConfig
    split_axis: int
    stored_axes: dict[str, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        slot = kwargs.get("tp_comm_buffer_name")  # how megatron-core's blocks name it: qkv, ...
        self.is_gated = slot == "fc1"
        if f"linear_{slot}" in self.lora.targets:
            own: Any = self
            own.adapter = Adapter(own.weight, self.lora, self.split_axis, own.tp_group)

    def _forward_impl(self, *args: Any, weight: Tensor, **kwargs: Any) -> Tensor:
        del weight  # the frozen one
        upstream: Any = super()
        return upstream._forward_impl(*args, weight=adapted_weight(self), **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The weight and the adapter, each split along its own axis."""
        own: Any = self
        split = B_NAME if self.split_axis == 0 else A_NAME
        found = make_sharded_tensors_for_checkpoint(
            own.state_dict(prefix="", keep_vars=True),
            prefix,
            self.stored_axes | {f"{ADAPTER}.{split}": self.split_axis},
            sharded_offsets,
            tp_group=own.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        key = f"{prefix}{ADAPTER}.{B_NAME}"
        if self.is_gated and key in found:  # rows of gate and of up, as the weight's in its MLP
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        return found


class AdaptedColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """megatron-core's, split over its outputs, with an adapter where it is a target."""

    split_axis = 0
    stored_axes = {"weight": 0, "bias": 0}  # noqa: RUF012 - never changed


class AdaptedRowParallelLinear(_Adapted, RowParallelLinear):
    """megatron-core's, split over its inputs, with an adapter where it is a target."""

    split_axis = 1
    stored_axes = {"weight": 1}  # noqa: RUF012 - never changed


def with_adapters(linear: type, lora: LoraConfig) -> type:
    """The class of a slot's linear, which megatron-core builds without knowing of adapters."""
    return type(linear.__name__, (linear,), {"lora": lora, "__doc__": linear.__doc__})


def freeze_base(model: torch.nn.Module) -> None:
    """Leave the adapters alone to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a key of a checkpoint, is an adapter's."""
    return f".{ADAPTER}." in name


def has_trained_adapters(model: torch.nn.Module) -> bool:
    """Whether some adapter adds something to its weight."""
    adapters = (module for module in model.modules() if isinstance(module, Adapter))
    return any(bool(adapter.lora_b.any()) for adapter in adapters)


def enable_adapters(model: torch.nn.Module, is_enabled: bool) -> None:
    """Compute with the adapters or, for a reference, without them."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.is_enabled = is_enabled
