"""Handing a weight's gradient over without a pass of its own.

megatron-core's DDP keeps one fp32 sum of gradients per weight, `weight.main_grad`, over the
micro-batches of a step.  A block that computes a weight gradient adds to it directly: the product
accumulates in its epilogue, and autograd is given an empty tensor so that DDP's hook, which starts
the reduction over data-parallel ranks, still fires.  Source: the contract is megatron-core's
`LinearWithGradAccumulationAndAsyncCommunication` (tensor_parallel/layers.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def main_grad_of(weight: Tensor) -> Tensor | None:
    """The fp32 sum of gradients that megatron-core's DDP keeps for `weight`, or None."""
    return getattr(weight, "main_grad", None)


def added_to_main_grad(weight: Tensor) -> Tensor:
    """What a backward returns for a weight whose gradient it has added to `main_grad`.

    The tensor is fresh because autograd keeps a fresh one and clones any other.  It is never read,
    but for a weight that also serves elsewhere (tied embeddings, which megatron-core marks): there
    it is added to the other use's gradient, and must be zero.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined] - DDP's mark
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def deliver_weight_gradient(weight: Tensor, gradient: Tensor) -> Tensor:
    """Add a finished gradient to `main_grad` where there is one; returns what backward returns."""
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return gradient.to(weight.dtype)
    main_grad.add_(gradient)
    return added_to_main_grad(weight)
