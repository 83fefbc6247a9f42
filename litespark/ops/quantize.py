"""Quantisation of a matrix to FP8, row by row and transposed, in one pass.

    stored = saturate(value * scale)        value ~ stored * scale_inv,  scale_inv = 1 / scale

A linear layer multiplies x [m, k] from both sides, x w^T and dy^T x, and Hopper's FP8 products read
both operands along the inner dimension: x is needed as [m, k] and as [k, m].  A tile is loaded
once, quantised in registers, and stored straight and transposed: 2 bytes read and 1 + 1 written
for each bf16 value, where a quantisation followed by a transpose would move 2 + 1 + 1 + 1.  The
transposed store writes `block_m` contiguous bytes of each row of the transpose, so blocks are at
least 64 rows high.

The largest |value|, of which the next scale is made, is taken on the way: one atomic maximum per
tile.  Finite values beyond the format's range saturate; NaN stays NaN; an infinity saturates too,
and shows in `amax`.  A NaN does not raise `amax` in a kernel, and makes it NaN in the reference.

Rows are addressed through two strides: row r of x starts at (r // inner) * outer_stride +
(r % inner) * inner_stride.  This covers a matrix with any row stride, and activations [s, b, ...]
in either memory order, (s, b) or FlashAttention's (b, s), without a copy.

Source: Micikevicius et al. 2022, arXiv 2209.05433 (formats, saturation, one scale per tensor).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import INTERPRETED, LaunchConfig, runs_kernel, tl, triton
from litespark.ops.formats import FP8_MAX, Fp8Matrix, QuantizeSpec, saturate

CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "quantize": (
        LaunchConfig(64, 128, num_warps=8),
        LaunchConfig(128, 64, num_warps=4),
        LaunchConfig(64, 64, num_warps=4),
        LaunchConfig(64, 128, num_warps=4),
        LaunchConfig(128, 64, num_warps=8),
        LaunchConfig(128, 128, num_warps=8),
        LaunchConfig(128, 128, num_warps=16),
        LaunchConfig(256, 64, num_warps=8),
    ),
    "transpose": (
        LaunchConfig(128, 128, num_warps=4),
        LaunchConfig(64, 64, num_warps=4),
        LaunchConfig(128, 64, num_warps=4),
        LaunchConfig(128, 128, num_warps=8),
        LaunchConfig(256, 128, num_warps=8),
    ),
    "amax": (
        LaunchConfig(16, 512, num_warps=4),
        LaunchConfig(8, 512, num_warps=4),
        LaunchConfig(8, 1024, num_warps=4),
        LaunchConfig(16, 1024, num_warps=8),
        LaunchConfig(32, 512, num_warps=8),
    ),
}

# The reciprocal of a scale must be a normal number: GPUs flush others to zero in products.
LARGEST_SCALE = 2.0**126


class RowLayout(NamedTuple):
    """Where the rows of a tensor lie; row r is at (r // inner) * outer + (r % inner) * inner."""

    rows: int
    columns: int
    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(x: Tensor) -> RowLayout:
    """Strides of the rows of x [m, k], [s, b, k] or [s, b, n, d], flattened to [s*b, k or n*d].

    Raises:
        LitesparkError: another number of dimensions, or rows that are not contiguous.
    """
    if x.dim() not in (2, 3, 4):
        raise LitesparkError(f"rows of a tensor of 2 to 4 dimensions; got {tuple(x.shape)}")
    lead = 1 if x.dim() == 2 else 2
    expected = 1  # stride
    for size, stride in reversed(list(zip(x.shape[lead:], x.stride()[lead:], strict=True))):
        if size != 1 and stride != expected:
            raise LitesparkError(
                f"the rows of a tensor must be contiguous; got shape {tuple(x.shape)} with "
                f"strides {x.stride()}"
            )
        expected *= size
    if lead == 1:
        return RowLayout(x.size(0), expected, 1, x.stride(0), 0)
    (s, b), (s_stride, b_stride) = x.shape[:2], x.stride()[:2]
    # Where one stride will do, the kernel is spared the division.
    if b == 1:
        return RowLayout(s, expected, 1, s_stride, 0)
    if s == 1 or s_stride == b * b_stride:
        return RowLayout(s * b, expected, 1, b_stride, 0)
    return RowLayout(s * b, expected, b, s_stride, b_stride)


# ------------------------------------------------------------------------------- references


def _quantize_reference(x: Tensor, spec: QuantizeSpec, rows: bool, columns: bool) -> Fp8Matrix:
    layout = row_layout(x)
    stored_mk = saturate(x.reshape(layout.rows, layout.columns), spec)
    return Fp8Matrix(
        rows_mk=stored_mk if rows else None,
        columns_km=stored_mk.t().contiguous() if columns else None,
        scale_inv=spec.scale_inv,
    )


def _current_scale_reference(amax: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    usable = torch.isfinite(amax) & (amax > 0)
    quotient = torch.full_like(amax, limit) / amax  # a Python number would be multiplied in
    scale = torch.where(usable, quotient.clamp(max=LARGEST_SCALE), 1.0)
    return scale, 1.0 / scale


# ---------------------------------------------------------------------------------- kernels


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride) -> Any:
    """64-bit offsets of the first elements of rows; see `RowLayout`."""
    outer = (rows // inner).to(tl.int64) * outer_stride
    return outer + (rows % inner).to(tl.int64) * inner_stride


@triton.jit
def to_fp8(values, scale, LIMIT: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """fp32 values * scale, saturated and rounded to nearest even; NaN stays NaN.

    The assembler of CUDA 12 (ptxas, in Triton 3.6 to 3.9) miscompiles an FP8 tile that is stored
    both as it is and transposed: a quarter of the transpose came out as bytes that the kernel
    never made.  It fuses the conversion with the byte permutation of the transpose; a move that it
    may not look through, four numbers at once, keeps the two apart (triton-lang/triton#11111).
    """
    scaled = tl.clamp(values * scale, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:
        return scaled.to(DTYPE)
    else:  # needed: what follows a return is compiled all the same
        stored = scaled.to(DTYPE)
        bits = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;",
            "=r,r",
            [stored.to(tl.uint8, bitcast=True)],
            dtype=tl.uint8,
            is_pure=False,
            pack=4,
        )
        return bits.to(DTYPE, bitcast=True)  # type: ignore[arg-type] - a type


@triton.jit
def raise_to_largest(amax_ptr, values) -> None:
    """amax = max(amax, max |values|); nothing is read back, so the order may be relaxed."""
    tl.atomic_max(amax_ptr, tl.max(tl.abs(values)), sem="relaxed")


@triton.jit
def tile(m, k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr) -> Any:
    """Rows, columns and mask of this program's tile of a matrix [m, k].

    Programs are numbered along k first: neighbours read neighbouring parts of the same DRAM pages.
    """
    tiles_k = tl.cdiv(k, BLOCK_K)
    row = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    return row, column, (row < m)[:, None] & (column < k)[None, :]


@triton.jit
def _quantize_kernel(
    x_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    amax_ptr,
    m,
    k,
    inner,
    outer_stride,
    inner_stride,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column, mask = tile(m, k, BLOCK_M, BLOCK_K)
    starts = row_offsets(row, inner, outer_stride, inner_stride)
    x = tl.load(x_ptr + starts[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    raise_to_largest(amax_ptr, x)
    stored = to_fp8(x, tl.load(scale_ptr), LIMIT, rows_ptr.dtype.element_ty)
    if ROWS:
        offsets = row.to(tl.int64)[:, None] * k + column[None, :]
        tl.store(rows_ptr + offsets, stored, mask=mask)
    if COLUMNS:
        offsets = column.to(tl.int64)[:, None] * m + row[None, :]
        tl.store(columns_ptr + offsets, tl.trans(stored), mask=tl.trans(mask))


@triton.jit
def _transpose_kernel(
    rows_ptr,
    columns_ptr,
    m,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column, mask = tile(m, k, BLOCK_M, BLOCK_K)
    stored = tl.load(rows_ptr + row.to(tl.int64)[:, None] * k + column[None, :], mask=mask)
    offsets = column.to(tl.int64)[:, None] * m + row[None, :]
    tl.store(columns_ptr + offsets, tl.trans(stored), mask=tl.trans(mask))


@triton.jit
def _amax_kernel(
    x_ptr,
    amax_ptr,
    m,
    k,
    inner,
    outer_stride,
    inner_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column, mask = tile(m, k, BLOCK_M, BLOCK_K)
    starts = row_offsets(row, inner, outer_stride, inner_stride)
    x = tl.load(x_ptr + starts[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    raise_to_largest(amax_ptr, x)


@triton.jit
def _current_scale_kernel(
    amax_ptr, scale_ptr, scale_inv_ptr, LIMIT: tl.constexpr, LARGEST: tl.constexpr
):
    amax = tl.load(amax_ptr)
    usable = (amax > 0.0) & (amax < float("inf"))
    scale = tl.minimum(tl.div_rn(LIMIT, tl.where(usable, amax, 1.0)), LARGEST)
    scale = tl.where(usable, scale, 1.0)
    tl.store(scale_ptr, scale)
    tl.store(scale_inv_ptr, tl.div_rn(1.0, scale))


# -------------------------------------------------------------------------------- launchers


def tiles(m: int, k: int, config: LaunchConfig) -> tuple[int]:
    """Grid of one program per tile of a matrix [m, k]."""
    return (triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_n),)


def tile_options(config: LaunchConfig, **constants: Any) -> dict[str, Any]:
    """The keyword arguments of a launch over tiles of block_m by block_n of a matrix [m, k]."""
    return {
        **constants,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _quantize_on_gpu(
    x: Tensor, spec: QuantizeSpec, rows: bool, columns: bool, config: LaunchConfig
) -> Fp8Matrix:
    layout = row_layout(x)
    m, k = layout.rows, layout.columns
    rows_mk = x.new_empty((m, k), dtype=spec.dtype) if rows else None
    columns_km = x.new_empty((k, m), dtype=spec.dtype) if columns else None
    _quantize_kernel[tiles(m, k, config)](
        x,
        columns_km if rows_mk is None else rows_mk,
        columns_km,
        spec.scale,
        spec.amax,
        m,
        k,
        layout.inner,
        layout.outer_stride,
        layout.inner_stride,
        **tile_options(config, LIMIT=FP8_MAX[spec.dtype], ROWS=rows, COLUMNS=columns),
    )
    return Fp8Matrix(rows_mk, columns_km, spec.scale_inv)


# --------------------------------------------------------------------------------- public


def quantize(
    x: Tensor,
    spec: QuantizeSpec,
    *,
    rows: bool = True,
    columns: bool = True,
    config: LaunchConfig | None = None,
) -> Fp8Matrix:
    """Quantise a matrix with one scale, as it is and/or transposed; raises `spec.amax`.

    Args:
        x: bf16, fp16 or fp32 [m, k] with contiguous rows of any stride; or [s, b, k] or
            [s, b, n, d] with any strides of s and b, flattened to m = s*b, k = n*d.
        spec: the FP8 format, its scale, and where the largest |x| goes.
        rows: store the matrix [m, k].
        columns: store its transpose [k, m].
        config: block_m of m by block_n of k a program; a power of two each.

    Raises:
        LitesparkError: rows that are not contiguous, or neither orientation asked for.
    """
    if not (rows or columns):
        raise LitesparkError("quantize: neither rows nor columns asked for")
    if runs_kernel(x):
        return _quantize_on_gpu(x, spec, rows, columns, config or CANDIDATES["quantize"][0])
    return _quantize_reference(x, spec, rows, columns)


def transpose(rows_mk: Tensor, *, config: LaunchConfig | None = None) -> Tensor:
    """The transpose of an FP8 matrix [m, k], contiguous [k, m], e.g. after rows were gathered.

    Raises:
        LitesparkError: a matrix that is not FP8 or not contiguous.
    """
    if rows_mk.dtype not in FP8_MAX or rows_mk.dim() != 2 or not rows_mk.is_contiguous():
        raise LitesparkError(
            f"transpose takes a contiguous FP8 matrix; got {rows_mk.dtype} of shape "
            f"{tuple(rows_mk.shape)} with strides {rows_mk.stride()}"
        )
    if not runs_kernel(rows_mk):
        return rows_mk.t().contiguous()
    m, k = rows_mk.shape
    columns_km = rows_mk.new_empty((k, m))
    config = config or CANDIDATES["transpose"][0]
    _transpose_kernel[tiles(m, k, config)](
        rows_mk.view(torch.uint8),
        columns_km.view(torch.uint8),
        m,
        k,
        **tile_options(config),
    )
    return columns_km


def raise_amax(x: Tensor, amax: Tensor, *, config: LaunchConfig | None = None) -> None:
    """amax = max(amax, max |x|) in one pass over x, laid out as in `quantize`; amax fp32 [1].

    Raises:
        LitesparkError: rows that are not contiguous.
    """
    layout = row_layout(x)
    if not runs_kernel(x):
        torch.maximum(amax, x.abs().amax().float().reshape(1), out=amax)
        return
    config = config or CANDIDATES["amax"][0]
    _amax_kernel[tiles(layout.rows, layout.columns, config)](
        x,
        amax,
        layout.rows,
        layout.columns,
        layout.inner,
        layout.outer_stride,
        layout.inner_stride,
        **tile_options(config),
    )


def current_scale(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale that maps `amax` to the largest number of FP8 `dtype`, and its reciprocal.

    All fp32 [1].  The scale is 1 where `amax` is zero or not finite, and at most 2^126.
    """
    if not runs_kernel(amax):
        return _current_scale_reference(amax, FP8_MAX[dtype])
    scale, scale_inv = torch.empty_like(amax), torch.empty_like(amax)
    limits: dict[str, Any] = {"LIMIT": FP8_MAX[dtype], "LARGEST": LARGEST_SCALE}
    _current_scale_kernel[(1,)](amax, scale, scale_inv, **limits)
    return scale, scale_inv
