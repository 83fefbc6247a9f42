"""Residual sum and RMSNorm in one pass over memory, in FP8 where an FP8 product follows.

    summed = x + residual                             rounded to x's dtype, then normalised
    rstd   = 1 / sqrt(mean(summed^2) + eps)           one per token
    normed = summed * rstd * weight

and backward, with xhat = summed * rstd, dy = dnormed * weight, and `dres`, the gradient that
reaches the residual stream past the norm:

    dsummed = dres + rstd * (dy - xhat * mean(dy * xhat))
    dweight = sum over tokens of dnormed * xhat

Everything between a load and a store is fp32.

Bytes per bf16 value: forward reads x and residual and writes the sum, 2 each, and normed, which is
2, or in FP8 1 for the rows and 1 for the transpose: 8, where separate passes for sum, norm and
quantisation would move 14.  Backward reads dnormed, summed and dres and writes dsummed, 2 each.

Two shapes of program.  Where all outputs lie as the inputs do, a program holds whole rows in
registers: nothing is read twice.  The transpose needs many rows at once, since each of its own rows
gets `block_m` contiguous bytes from a program; at least 32, a memory sector, and such a block of
whole rows does not fit into registers.  The program walks over the block twice, for the sums of its
rows and then for the output.  The second walk reads what the first has just touched, from the L2
cache as long as the blocks of all running programs fit there.  It goes backwards, so that a cache
too small still holds the newest part, and what is not read again is marked as first to be evicted.

dweight is the same in every run: each program adds up its own rows, and torch adds the partial sums
[programs, h].

Sources: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4 (the norm); the rest by the chain rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig, runs_kernel, tl, triton
from litespark.ops.formats import FP8_MAX, Fp8Matrix, QuantizeSpec, saturate
from litespark.ops.quantize import raise_to_largest, to_fp8


def _configs(*sizes: tuple[int, int, int, int]) -> tuple[LaunchConfig, ...]:
    """Each from block_m, block_n, num_warps, num_stages."""
    return tuple(LaunchConfig(*size) for size in sizes)


# "forward" and "backward" hold whole rows where block_n >= h and walk over them otherwise;
# "forward_columns" are the launches that also store a transpose.
CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "forward": _configs(
        *((1, 2048, 4, 1), (1, 2048, 2, 1), (1, 2048, 8, 1), (2, 2048, 4, 1)),
        *((2, 2048, 8, 1), (4, 2048, 8, 1), (4, 2048, 16, 1)),
    ),
    "forward_columns": _configs(
        *((32, 512, 16, 1), (32, 256, 16, 1), (64, 128, 16, 1), (32, 128, 8, 1)),
        *((64, 64, 8, 1), (64, 64, 8, 3), (64, 128, 16, 3), (128, 64, 16, 1)),
        (16, 2048, 16, 1),  # the block in registers
    ),
    "backward": _configs(
        *((1, 2048, 4, 3), (1, 2048, 4, 2), (1, 2048, 4, 4), (1, 2048, 8, 3)),
        *((1, 2048, 8, 2), (2, 2048, 8, 2), (2, 2048, 4, 2)),
    ),
    "recompute": _configs((2, 1024, 4, 1), (1, 2048, 4, 1), (4, 1024, 4, 1), (1, 1024, 4, 1)),
}

WHOLE_ROW = 8192  # elements; longer rows do not fit into a program's registers
WALKING = LaunchConfig(4, 2048, num_warps=16, num_stages=1)  # over rows that are longer


@dataclass(frozen=True)
class NormOutput:
    """What the norm computed.

    `summed_mh` is x + residual in x's dtype, or x itself where there is no residual; `normed` has
    x's dtype [m, h], or is FP8; `rstd_m` is fp32.
    """

    summed_mh: Tensor
    normed: Tensor | Fp8Matrix
    rstd_m: Tensor


@dataclass(frozen=True)
class NormGradients:
    """Gradients of the norm.

    `dsummed_mh`, in the sum's dtype, is the gradient of the sum, hence also of x and of residual;
    `dweight_h` is fp32.
    """

    dsummed_mh: Tensor
    dweight_h: Tensor


# ------------------------------------------------------------------------------- references


def _forward_reference(
    x_mh: Tensor,
    residual_mh: Tensor | None,
    weight_h: Tensor,
    eps: float,
    quantize: QuantizeSpec | None,
    columns: bool,
    amax: Tensor | None,
) -> NormOutput:
    summed_mh = x_mh
    if residual_mh is not None:
        summed_mh = (x_mh.float() + residual_mh.float()).to(x_mh.dtype)
    rstd_m = torch.rsqrt(summed_mh.float().square().mean(-1) + eps)
    normed_mh = summed_mh.float() * rstd_m[:, None] * weight_h.float()
    if quantize is not None:
        return NormOutput(summed_mh, _fp8_reference(normed_mh, quantize, columns), rstd_m)
    normed_mh = normed_mh.to(x_mh.dtype)
    if amax is not None:
        torch.maximum(amax, normed_mh.abs().amax().float().reshape(1), out=amax)
    return NormOutput(summed_mh, normed_mh, rstd_m)


def _backward_reference(
    dnormed_mh: Tensor,
    summed_mh: Tensor,
    weight_h: Tensor,
    rstd_m: Tensor,
    dsummed_mh: Tensor | None,
) -> NormGradients:
    xhat_mh = summed_mh.float() * rstd_m[:, None]
    dy_mh = dnormed_mh.float() * weight_h.float()
    mean_m1 = (dy_mh * xhat_mh).mean(-1, keepdim=True)
    found_mh = rstd_m[:, None] * (dy_mh - xhat_mh * mean_m1)
    if dsummed_mh is not None:
        found_mh = found_mh + dsummed_mh.float()
    return NormGradients(
        dsummed_mh=found_mh.to(summed_mh.dtype),
        dweight_h=(dnormed_mh.float() * xhat_mh).sum(0),
    )


def _fp8_reference(values_mh: Tensor, spec: QuantizeSpec, columns: bool) -> Fp8Matrix:
    stored_mh = saturate(values_mh, spec)
    return Fp8Matrix(stored_mh, stored_mh.t().contiguous() if columns else None, spec.scale_inv)


# ---------------------------------------------------------------------------------- kernels
# A pointer that is None takes its part of a kernel away when the kernel is compiled.


@triton.jit
def _tile(row, first, m, h, BLOCK_N: tl.constexpr) -> Any:
    """`BLOCK_N` columns from `first` on, which of them exist, and the mask of the rows' tile.

    The compiler is told that eight numbers at most follow one another.  It would otherwise give a
    thread 16 elements, for a 16-byte store of FP8, in the whole kernel, where a warp's 16-byte
    accesses to bf16 would then be 32 bytes apart.
    """
    column = first + tl.max_contiguous(tl.arange(0, BLOCK_N), 8)
    exists = column < h
    return column, exists, (row < m)[:, None] & exists[None, :]


@triton.jit
def _offsets(row, column, row_size) -> Any:
    """64-bit offsets of a tile of a matrix [.., row_size]."""
    return row.to(tl.int64)[:, None] * row_size + column[None, :]


@triton.jit
def _load(pointers, mask) -> Any:
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_last(pointers, mask) -> Any:
    """What this kernel does not read again."""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _add(x_ptr, residual_ptr, summed_ptr, offsets, mask) -> Any:
    """A tile of the sum in fp32; it is stored where there is a residual, and x otherwise."""
    if residual_ptr is None:
        return _load(x_ptr + offsets, mask)
    else:  # needed: what follows a return is compiled all the same
        summed = _load_last(x_ptr + offsets, mask) + _load_last(residual_ptr + offsets, mask)
        rounded = summed.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offsets, rounded, mask=mask)
        return rounded.to(tl.float32)


@triton.jit
def _rstd(squares, rstd_ptr, row, m, h, eps) -> Any:
    """Stores and returns rstd of rows from their squares."""
    rstd = tl.rsqrt(tl.sum(squares, 1) / h + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < m)
    return rstd


@triton.jit
def _scaled(summed, rstd, weight_ptr, column, exists) -> Any:
    return summed * rstd[:, None] * _load(weight_ptr + column, exists)[None, :]


@triton.jit
def _store(
    values, rows_ptr, columns_ptr, scale_ptr, row, column, mask, m, h, LIMIT: tl.constexpr
) -> Any:
    """Stores a tile, or with a scale FP8 and its transpose; returns |values| that `amax` sees."""
    if scale_ptr is None:
        stored = values.to(rows_ptr.dtype.element_ty)
        values = stored.to(tl.float32)
    else:
        stored = to_fp8(values, tl.load(scale_ptr), LIMIT, rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + _offsets(row, column, h), stored, mask=mask)
    if columns_ptr is not None:
        tl.store(columns_ptr + _offsets(column, row, m), tl.trans(stored), mask=tl.trans(mask))
    return tl.abs(values)


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    summed_ptr,
    normed_ptr,
    columns_ptr,
    rstd_ptr,
    scale_ptr,
    amax_ptr,
    m,
    h,
    eps,
    LIMIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if WHOLE:
        column, exists, mask = _tile(row, 0, m, h, BLOCK_N)
        summed = _add(x_ptr, residual_ptr, summed_ptr, _offsets(row, column, h), mask)
        rstd = _rstd(summed * summed, rstd_ptr, row, m, h, eps)
        normed = _scaled(summed, rstd, weight_ptr, column, exists)
        largest = _store(normed, normed_ptr, columns_ptr, scale_ptr, row, column, mask, m, h, LIMIT)
    else:
        tiles = tl.cdiv(h, BLOCK_N)
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.range(tiles, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
            column, exists, mask = _tile(row, index * BLOCK_N, m, h, BLOCK_N)
            summed = _add(x_ptr, residual_ptr, summed_ptr, _offsets(row, column, h), mask)
            squares += summed * summed
        tl.debug_barrier()  # below, a thread may load what another one has stored
        rstd = _rstd(squares, rstd_ptr, row, m, h, eps)
        largest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for index in tl.range(tiles, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
            column, exists, mask = _tile(row, (tiles - 1 - index) * BLOCK_N, m, h, BLOCK_N)
            summed = _load_last(summed_ptr + _offsets(row, column, h), mask)
            normed = _scaled(summed, rstd, weight_ptr, column, exists)
            magnitude = _store(
                normed, normed_ptr, columns_ptr, scale_ptr, row, column, mask, m, h, LIMIT
            )
            largest = tl.maximum(largest, magnitude)
    if amax_ptr is not None:
        raise_to_largest(amax_ptr, largest)


@triton.jit
def _rms_norm_recompute_kernel(
    summed_ptr, weight_ptr, rstd_ptr, normed_ptr, m, h, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> None:
    tiles = tl.cdiv(h, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column, exists, mask = _tile(row, tl.program_id(0) % tiles * BLOCK_N, m, h, BLOCK_N)
    offsets = _offsets(row, column, h)
    rstd = _load(rstd_ptr + row, row < m)
    normed = _scaled(_load(summed_ptr + offsets, mask), rstd, weight_ptr, column, exists)
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward_rows_kernel(
    dnormed_ptr,
    summed_ptr,
    weight_ptr,
    rstd_ptr,
    dres_ptr,
    dsummed_ptr,
    partial_ptr,
    m,
    h,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Whole rows; few programs, so that there are few partial sums."""
    column = tl.arange(0, BLOCK_N)
    weight = _load(weight_ptr + column, column < h)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(m, BLOCK_M)
    for block in tl.range(first, blocks, programs, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < m)[:, None] & (column < h)[None, :]
        offsets = _offsets(row, column, h)
        rstd = _load(rstd_ptr + row, row < m)[:, None]
        dnormed = _load(dnormed_ptr + offsets, mask)
        xhat = _load(summed_ptr + offsets, mask) * rstd
        dweight += dnormed * xhat
        dy = dnormed * weight
        mean = tl.sum(dy * xhat, 1, keep_dims=True) / h
        dsummed = rstd * (dy - xhat * mean)
        if dres_ptr is not None:
            dsummed += _load(dres_ptr + offsets, mask)
        tl.store(dsummed_ptr + offsets, dsummed.to(dsummed_ptr.dtype.element_ty), mask=mask)
    partial = first.to(tl.int64) * h + column
    tl.store(partial_ptr + partial, tl.sum(dweight, 0), mask=column < h)


@triton.jit
def _rms_norm_backward_blocks_kernel(
    dnormed_ptr,
    summed_ptr,
    weight_ptr,
    rstd_ptr,
    dres_ptr,
    dsummed_ptr,
    partial_ptr,
    m,
    h,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One block of rows a program, walked over twice."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tiles = tl.cdiv(h, BLOCK_N)
    rstd = _load(rstd_ptr + row, row < m)[:, None]
    partial_ptr += tl.program_id(0).to(tl.int64) * h
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in tl.range(tiles, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        column, exists, mask = _tile(row, index * BLOCK_N, m, h, BLOCK_N)
        offsets = _offsets(row, column, h)
        dnormed = _load(dnormed_ptr + offsets, mask)
        xhat = _load(summed_ptr + offsets, mask) * rstd
        tl.store(partial_ptr + column, tl.sum(dnormed * xhat, 0), mask=exists)
        products += dnormed * _load(weight_ptr + column, exists)[None, :] * xhat
    mean = tl.sum(products, 1, keep_dims=True) / h
    for index in tl.range(tiles, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        column, exists, mask = _tile(row, (tiles - 1 - index) * BLOCK_N, m, h, BLOCK_N)
        offsets = _offsets(row, column, h)
        dy = _load_last(dnormed_ptr + offsets, mask) * _load(weight_ptr + column, exists)[None, :]
        xhat = _load_last(summed_ptr + offsets, mask) * rstd
        dsummed = rstd * (dy - xhat * mean)
        if dres_ptr is not None:
            dsummed += _load_last(dres_ptr + offsets, mask)
        tl.store(dsummed_ptr + offsets, dsummed.to(dsummed_ptr.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------- launchers


def _default(name: str, h: int) -> LaunchConfig:
    """The first candidate, with tiles that suit rows of h elements where those are held whole."""
    best = CANDIDATES[name][0]
    if name not in ("forward", "backward"):
        return best
    if h > WHOLE_ROW:
        return WALKING
    block_n = triton.next_power_of_2(h)
    block_m = max(1, min(16, 2048 // block_n))
    warps = max(1, block_m * block_n // 512)  # 16 elements a thread
    return LaunchConfig(block_m, block_n, warps, best.num_stages)


def _options(config: LaunchConfig, **constants: Any) -> dict[str, Any]:
    return {
        **constants,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
    }


def _resident_programs(device: torch.device) -> int:
    """Programs of the row-wise backward: two an SM.

    Each has the loads of several rows under way, so that two keep the memory busy; more of them
    leave more partial sums to add up, which costs more than they gain.
    """
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _empty_fp8(like_mh: Tensor, spec: QuantizeSpec, columns: bool) -> Fp8Matrix:
    m, h = like_mh.shape
    return Fp8Matrix(
        rows_mk=like_mh.new_empty((m, h), dtype=spec.dtype),
        columns_km=like_mh.new_empty((h, m), dtype=spec.dtype) if columns else None,
        scale_inv=spec.scale_inv,
    )


def _forward_on_gpu(
    x_mh: Tensor,
    residual_mh: Tensor | None,
    weight_h: Tensor,
    eps: float,
    quantize: QuantizeSpec | None,
    columns: bool,
    amax: Tensor | None,
    config: LaunchConfig | None,
) -> NormOutput:
    m, h = x_mh.shape
    if quantize is not None:
        normed = _empty_fp8(x_mh, quantize, columns)
        rows_mh, columns_hm = normed.rows_mk, normed.columns_km
        scale, amax, limit = quantize.scale, quantize.amax, FP8_MAX[quantize.dtype]
    else:
        normed = rows_mh = torch.empty_like(x_mh)
        columns_hm, scale, limit = None, None, 0.0
    if config is None:
        config = _default("forward" if columns_hm is None else "forward_columns", h)
    summed_mh = x_mh if residual_mh is None else torch.empty_like(x_mh)
    rstd_m = x_mh.new_empty(m, dtype=torch.float32)
    inputs = (x_mh, residual_mh, weight_h)
    outputs = (summed_mh, rows_mh, columns_hm, rstd_m)
    grid = (triton.cdiv(m, config.block_m),)
    options = _options(config, LIMIT=limit, WHOLE=config.block_n >= h, STAGES=config.num_stages)
    _rms_norm_forward_kernel[grid](*inputs, *outputs, scale, amax, m, h, float(eps), **options)
    return NormOutput(summed_mh, normed, rstd_m)


def _backward_on_gpu(
    dnormed_mh: Tensor,
    summed_mh: Tensor,
    weight_h: Tensor,
    rstd_m: Tensor,
    dres_mh: Tensor | None,
    config: LaunchConfig | None,
) -> NormGradients:
    m, h = summed_mh.shape
    config = config or _default("backward", h)
    whole_rows = config.block_n >= h
    programs = triton.cdiv(m, config.block_m)
    if whole_rows:
        programs = min(programs, _resident_programs(summed_mh.device))
    dsummed_mh = torch.empty_like(summed_mh)
    partial_ph = summed_mh.new_empty((programs, h), dtype=torch.float32)
    tensors = (dnormed_mh, summed_mh, weight_h, rstd_m, dres_mh, dsummed_mh, partial_ph)
    kernel = _rms_norm_backward_rows_kernel if whole_rows else _rms_norm_backward_blocks_kernel
    kernel[(programs,)](*tensors, m, h, **_options(config, STAGES=config.num_stages))
    return NormGradients(dsummed_mh, partial_ph.sum(0))


# --------------------------------------------------------------------------------- public


def _check(weight_h: Tensor, rstd_m: Tensor | None, *matrices_mh: Tensor | None) -> None:
    """All matrices alike [m, h], weight [h], rstd [m], everything contiguous."""
    matrices = [matrix for matrix in matrices_mh if matrix is not None]
    shape = matrices[0].shape
    expected = [(matrix, shape) for matrix in matrices] + [(weight_h, shape[-1:])]
    if rstd_m is not None:
        expected.append((rstd_m, shape[:1]))
    for tensor, its_shape in expected:
        if len(shape) != 2 or tensor.shape != its_shape or not tensor.is_contiguous():
            raise LitesparkError(
                "rms_norm takes contiguous matrices [m, h] of one shape, weight [h] and rstd [m]; "
                f"got {[tuple(tensor.shape) for tensor, _ in expected]}, of which "
                f"{tuple(tensor.shape)} has strides {tensor.stride()}"
            )


def add_rms_norm(
    x_mh: Tensor,
    residual_mh: Tensor | None,
    weight_h: Tensor,
    eps: float,
    *,
    quantize: QuantizeSpec | None = None,
    columns: bool = True,
    amax: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> NormOutput:
    """RMSNorm of x + residual (Zhang and Sennrich 2019, eq. 4), optionally in FP8.

    Args:
        x_mh: bf16, fp16 or fp32 [m, h], contiguous.
        residual_mh: [m, h], contiguous; None where there is nothing to add.
        weight_h: [h], any of these dtypes.
        eps: added to the mean square.
        quantize: store normed in FP8 only, rounded once from fp32; its amax is raised.
        columns: of FP8, store the transpose too.
        amax: fp32 [1], without `quantize`; raised to the largest |normed| as it is stored, so that
            a scale of this tensor needs no pass of its own.
        config: a program's rows and columns; whole rows stay in registers where block_n >= h.

    Raises:
        LitesparkError: shapes that do not fit or are not contiguous; `amax` with `quantize`.
    """
    _check(weight_h, None, x_mh, residual_mh)
    if amax is not None and quantize is not None:
        raise LitesparkError("add_rms_norm: `amax` is for bf16 output; `quantize` has its own")
    if runs_kernel(x_mh):
        return _forward_on_gpu(x_mh, residual_mh, weight_h, eps, quantize, columns, amax, config)
    return _forward_reference(x_mh, residual_mh, weight_h, eps, quantize, columns, amax)


def rms_norm_backward(
    dnormed_mh: Tensor,
    summed_mh: Tensor,
    weight_h: Tensor,
    rstd_m: Tensor,
    *,
    dsummed_mh: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> NormGradients:
    """Gradients of `add_rms_norm`; the formulae are at the head of this file.

    Args:
        dnormed_mh: gradient of normed, bf16, fp16 or fp32 [m, h], contiguous.
        summed_mh: forward's sum, [m, h], contiguous.
        weight_h: the norm's weight, [h].
        rstd_m: forward's rstd, fp32 [m].
        dsummed_mh: the gradient that reaches the sum past the norm, [m, h], contiguous.
        config: a program's rows and columns; whole rows stay in registers where block_n >= h.

    Raises:
        LitesparkError: shapes that do not fit or are not contiguous.
    """
    _check(weight_h, rstd_m, dnormed_mh, summed_mh, dsummed_mh)
    inputs = (dnormed_mh, summed_mh, weight_h, rstd_m, dsummed_mh)
    if runs_kernel(summed_mh):
        return _backward_on_gpu(*inputs, config)
    return _backward_reference(*inputs)


def recompute_normed(
    summed_mh: Tensor, weight_h: Tensor, rstd_m: Tensor, *, config: LaunchConfig | None = None
) -> Tensor:
    """The normed [m, h] of `add_rms_norm` again, bit for bit, from what it saved.

    Raises:
        LitesparkError: shapes that do not fit or are not contiguous.
    """
    _check(weight_h, rstd_m, summed_mh)
    if not runs_kernel(summed_mh):
        return (summed_mh.float() * rstd_m[:, None] * weight_h.float()).to(summed_mh.dtype)
    m, h = summed_mh.shape
    config = config or _default("recompute", h)
    normed_mh = torch.empty_like(summed_mh)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(h, config.block_n),)
    _rms_norm_recompute_kernel[grid](
        summed_mh, weight_h, rstd_m, normed_mh, m, h, **_options(config)
    )
    return normed_mh
