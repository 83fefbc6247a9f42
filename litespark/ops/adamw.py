"""One optimizer step of AdamW in one pass over memory.

With gradient g, moments m and v, fp32 master weight p, and step t counted from 1:

    g  = g * multiplier                          gradient clipping
    m  = m + (1 - beta1) (g - m)
    v  = beta2 v + (1 - beta2) g^2
    p  = p (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + epsilon)
    weight = bf16(p), or saturate(p * scale)     what the model computes with

As separate passes, clipping reads and writes the gradients and the copy into the model reads the
masters again: 42 bytes per element.  Here an element is read (p, g, m, v: 16 bytes) and written
(p, m, v, weight: 14 bytes) once: 30, and 29 with a weight in FP8, whose largest value is found on
the way.  The clipping factor is read from device memory, so that the host can queue the update
without waiting for the gradients' norm.

All other factors are computed on the host in fp64, as torch does, and handed over as fp32 numbers
(the kernel's annotations say so); Triton does not specialise on those, so that a new learning rate
compiles nothing.

Source: Loshchilov and Hutter 2019, algorithm 2; the order of operations is `torch.optim.AdamW`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig, runs_kernel, tl, triton
from litespark.ops.formats import FP8_MAX, QuantizeSpec, saturate
from litespark.ops.quantize import raise_to_largest, to_fp8

# `block_n` elements a program; there are no rows.  With four elements a thread every fp32 access is
# 16 bytes wide and a warp's neighbours follow each other; with eight the bf16 store is as wide too,
# but the compiler then moves the fp32 results through shared memory.
DEFAULT = LaunchConfig(block_m=1, block_n=1024, num_warps=8)
CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "step": (
        DEFAULT,
        LaunchConfig(block_m=1, block_n=512, num_warps=4),
        LaunchConfig(block_m=1, block_n=256, num_warps=2),
        LaunchConfig(block_m=1, block_n=2048, num_warps=16),
        LaunchConfig(block_m=1, block_n=1024, num_warps=4),
        LaunchConfig(block_m=1, block_n=2048, num_warps=8),
        LaunchConfig(block_m=1, block_n=2048, num_warps=4),
    )
}


@dataclass(frozen=True)
class AdamWOptions:
    """The numbers of one step; `step` counts from 1 and includes this one."""

    lr: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    step: int

    @property
    def kept(self) -> float:
        """What weight decay leaves of a weight."""
        return 1.0 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        """The learning rate over the first moment's bias correction."""
        return self.lr / (1.0 - self.betas[0] ** self.step)

    @property
    def root_correction(self) -> float:
        """Square root of the second moment's bias correction."""
        return math.sqrt(1.0 - self.betas[1] ** self.step)


def adamw_step_reference(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    options: AdamWOptions,
    *,
    weight: Tensor | None = None,
    quantize: QuantizeSpec | None = None,
    multiplier: Tensor | None = None,
) -> None:
    """The step in plain torch, as `adamw_step` describes it; leaves `grad` as it is."""
    beta1, beta2 = options.betas
    if multiplier is not None:
        grad = grad * multiplier
    master.mul_(options.kept)
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    denominator = (exp_avg_sq.sqrt() / options.root_correction).add_(options.epsilon)
    master.addcdiv_(exp_avg, denominator, value=-options.step_size)
    if weight is not None:
        weight.copy_(master if quantize is None else saturate(master, quantize))


@triton.jit
def _adamw_kernel(
    master_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    weight_ptr,
    multiplier_ptr,
    scale_ptr,
    amax_ptr,
    numel,  # may exceed 32 bits, which the annotation `int` would mean
    kept: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    inverse_root_correction: float,
    epsilon: float,
    HAS_WEIGHT: tl.constexpr,
    HAS_MULTIPLIER: tl.constexpr,
    QUANTIZES: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    offsets_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_n = offsets_n < numel
    grad_n = tl.load(grad_ptr + offsets_n, mask=inside_n, other=0.0)
    exp_avg_n = tl.load(exp_avg_ptr + offsets_n, mask=inside_n, other=0.0)
    exp_avg_sq_n = tl.load(exp_avg_sq_ptr + offsets_n, mask=inside_n, other=0.0)
    master_n = tl.load(master_ptr + offsets_n, mask=inside_n, other=0.0)
    if HAS_MULTIPLIER:
        grad_n = grad_n * tl.load(multiplier_ptr)
    exp_avg_n = exp_avg_n + (grad_n - exp_avg_n) * one_minus_beta1
    exp_avg_sq_n = exp_avg_sq_n * beta2 + grad_n * grad_n * one_minus_beta2
    denominator_n = tl.sqrt(exp_avg_sq_n) * inverse_root_correction + epsilon
    master_n = master_n * kept - step_size * (exp_avg_n / denominator_n)
    tl.store(exp_avg_ptr + offsets_n, exp_avg_n, mask=inside_n)
    tl.store(exp_avg_sq_ptr + offsets_n, exp_avg_sq_n, mask=inside_n)
    tl.store(master_ptr + offsets_n, master_n, mask=inside_n)
    if HAS_WEIGHT:
        if QUANTIZES:
            raise_to_largest(amax_ptr, tl.where(inside_n, master_n, 0.0))
            weight_n = to_fp8(master_n, tl.load(scale_ptr), LIMIT, weight_ptr.dtype.element_ty)
        else:
            weight_n = master_n.to(weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + offsets_n, weight_n, mask=inside_n)


def adamw_step(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    options: AdamWOptions,
    *,
    weight: Tensor | None = None,
    quantize: QuantizeSpec | None = None,
    multiplier: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """Update a weight and its moments in place, and write the model's copy of the weight.

    Args:
        master: fp32, contiguous; updated.
        grad: fp32, of the master's shape, contiguous; read only.
        exp_avg: first moment, like the master; updated.
        exp_avg_sq: second moment, like the master; updated.
        options: learning rate and the like, and which step this is.
        weight: bf16 (or any float dtype), of the master's shape, contiguous; receives the new
            master, rounded to nearest.
        quantize: of a weight in FP8: its scale, which is read, and `amax`, which is raised to the
            largest |master| of the new values.
        multiplier: fp32 [1] on the master's device; gradients count times this number.
        config: how the kernel is launched.

    Raises:
        LitesparkError: a tensor of another shape or dtype, or that is not contiguous; a weight in
            FP8 without its scale, or one of another format with a scale.
    """
    _check(master, grad, exp_avg, exp_avg_sq, weight)
    _check_format(weight, quantize)
    if not runs_kernel(master):
        adamw_step_reference(
            *(master, grad, exp_avg, exp_avg_sq, options),
            weight=weight,
            quantize=quantize,
            multiplier=multiplier,
        )
        return
    config = config or DEFAULT
    beta1, beta2 = options.betas
    _adamw_kernel[(triton.cdiv(master.numel(), config.block_n),)](
        master,
        grad,
        exp_avg,
        exp_avg_sq,
        master if weight is None else weight,
        master if multiplier is None else multiplier,
        master if quantize is None else quantize.scale,
        master if quantize is None else quantize.amax,
        master.numel(),
        options.kept,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        options.step_size,
        1.0 / options.root_correction,
        options.epsilon,
        HAS_WEIGHT=weight is not None,
        HAS_MULTIPLIER=multiplier is not None,
        QUANTIZES=quantize is not None,
        LIMIT=0.0 if quantize is None else FP8_MAX[quantize.dtype],
        BLOCK=config.block_n,
        num_warps=config.num_warps,  # pyright: ignore[reportCallIssue] - Triton's own
        num_stages=config.num_stages,  # pyright: ignore[reportCallIssue]
    )


def _check(master: Tensor, *others: Tensor | None) -> None:
    """Refuse what the kernel, which sees flat memory, would update wrongly.

    The last of `others`, the model's weight, may have another dtype.
    """
    for index, tensor in enumerate((master, *others)):
        if tensor is None:
            continue
        is_weight = index == len(others)
        if (
            tensor.shape != master.shape
            or not tensor.is_contiguous()
            or (tensor.dtype != torch.float32 and not is_weight)
        ):
            raise LitesparkError(
                "AdamW's tensors are contiguous, of one shape, and fp32 except for the model's "
                f"weight; number {index} is {tensor.dtype} {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}, the master is {tuple(master.shape)}"
            )


def _check_format(weight: Tensor | None, quantize: QuantizeSpec | None) -> None:
    """FP8 without a scale would be rounded as it is: mostly to zero."""
    found = None if weight is None or weight.dtype not in FP8_MAX else weight.dtype
    wanted = None if quantize is None else quantize.dtype
    if found != wanted:
        raise LitesparkError(
            f"a weight in FP8, and no other, has a scale of its format; the weight is "
            f"{None if weight is None else weight.dtype}, the scale is of {wanted}"
        )
