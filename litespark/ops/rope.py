"""Rotary position embedding, fused with the split of the fused QKV projection into q, k and v.

The projection's output holds, for each of g key/value groups, p query heads, one key head and one
value head of size d: [s, b, g*(p+2)*d], megatron-core's layout.  Position s turns the pair
(x[r], x[r + d/2]) of each query and key head by an angle that depends on s and r < d/2:

    out[r]       = x[r] cos[s, r] - x[r + d/2] sin[s, r]
    out[r + d/2] = x[r + d/2] cos[s, r] + x[r] sin[s, r]

(the "half", or NeoX, form of the rotation).  The backward is the rotation by the opposite angle.

One kernel reads each value once and writes it once, to q, k or v: 4 bytes moved a bf16 value, where
splitting, rotating q and rotating k one after the other move each value two or three times.  The
backward does the same in the other direction and can hand the gradient to the FP8 products of the
projection directly, quantised row by row and transposed (2 bytes read, 1 + 1 written).

A program takes `block_m` tokens and `block_n` of the g*(p+2) heads.  The cosines and sines of its
tokens are loaded once and stay in registers; the b tokens of one position share them.

Sources: Su et al. 2021, arXiv 2104.09864 (equation 34); Black et al. 2022, arXiv 2204.06745 (the
half form).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig, runs_kernel, tl, triton
from litespark.ops.formats import FP8_MAX, Fp8Matrix, QuantizeSpec, saturate
from litespark.ops.quantize import raise_amax, to_fp8

# block_m tokens and block_n heads a program.
CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "forward": (
        LaunchConfig(32, 5, num_warps=4),
        LaunchConfig(16, 5, num_warps=4),
        LaunchConfig(16, 10, num_warps=2),
        LaunchConfig(32, 2, num_warps=4),
        LaunchConfig(32, 10, num_warps=4),
        LaunchConfig(64, 2, num_warps=4),
        LaunchConfig(64, 5, num_warps=8),
    ),
    "backward": (
        LaunchConfig(32, 5, num_warps=4),
        LaunchConfig(16, 5, num_warps=4),
        LaunchConfig(16, 10, num_warps=2),
        LaunchConfig(32, 2, num_warps=4),
        LaunchConfig(32, 10, num_warps=4),
        LaunchConfig(64, 2, num_warps=4),
        LaunchConfig(64, 5, num_warps=8),
    ),
    # Rows of the transpose get block_m contiguous bytes, so these blocks are higher.
    "backward_fp8": (
        LaunchConfig(128, 1, num_warps=16),
        LaunchConfig(64, 1, num_warps=4),
        LaunchConfig(128, 1, num_warps=8),
        LaunchConfig(64, 1, num_warps=8),
        LaunchConfig(64, 2, num_warps=8),
        LaunchConfig(64, 5, num_warps=8),
        LaunchConfig(128, 2, num_warps=8),
    ),
}


# ------------------------------------------------------------------------------- references


def _rotate(x_sbnd: Tensor, cos_sr: Tensor, sin_sr: Tensor) -> Tensor:
    cos, sin = cos_sr[:, None, None], sin_sr[:, None, None]
    first, second = x_sbnd.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _split_rope_reference(
    qkv_sbw: Tensor, cos_sr: Tensor, sin_sr: Tensor, groups: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    s, b, _ = qkv_sbw.shape
    qkv_sbghd = qkv_sbw.reshape(s, b, groups, -1, head_dim)
    q_sbnd = qkv_sbghd[:, :, :, :-2].reshape(s, b, -1, head_dim)
    k_sbgd, v_sbgd = qkv_sbghd[:, :, :, -2], qkv_sbghd[:, :, :, -1]
    return (
        _rotate(q_sbnd, cos_sr, sin_sr).to(qkv_sbw.dtype),
        _rotate(k_sbgd, cos_sr, sin_sr).to(qkv_sbw.dtype),
        v_sbgd.contiguous(),
    )


def _split_rope_backward_reference(
    gradients: tuple[Tensor, Tensor, Tensor], cos_sr: Tensor, sin_sr: Tensor
) -> Tensor:
    """The gradient in fp32 [m, w]."""
    dq_sbnd, dk_sbgd, dv_sbgd = gradients
    s, b, groups, head_dim = dk_sbgd.shape
    parts = (
        _rotate(dq_sbnd, cos_sr, -sin_sr).reshape(s, b, groups, -1, head_dim),
        _rotate(dk_sbgd, cos_sr, -sin_sr).unsqueeze(3),
        dv_sbgd.float().unsqueeze(3),
    )
    return torch.cat(parts, dim=3).reshape(s * b, -1)


# ---------------------------------------------------------------------------------- kernels


@triton.jit
def _row_starts(position, lane, position_stride, lane_stride):
    return (position.to(tl.int64) * position_stride + lane.to(tl.int64) * lane_stride)[:, None]


@triton.jit
def _load_halves(ptr, offsets, mask, HALF: tl.constexpr):
    first = tl.load(ptr + offsets, mask=mask, other=0.0)
    second = tl.load(ptr + offsets + HALF, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_halves(ptr, offsets, first, second, mask, HALF: tl.constexpr):
    tl.store(ptr + offsets, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + offsets + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _split_rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rows,
    batch,
    position_stride,
    lane_stride,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):
    HEAD: tl.constexpr = 2 * HALF
    TOTAL: tl.constexpr = GROUPS * (QUERIES + 2)
    chunks = tl.cdiv(TOTAL, HEADS)
    row = tl.program_id(0) // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    position, lane = row // batch, row % batch
    r = tl.arange(0, BLOCK_R)[None, :]
    tile = (row < rows)[:, None] & (r < HALF)
    angle = position.to(tl.int64)[:, None] * HALF + r
    cos = tl.load(cos_ptr + angle, mask=tile, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=tile, other=0.0)
    source = _row_starts(position, lane, position_stride, lane_stride) + r
    row_64 = row.to(tl.int64)[:, None]
    for i in range(HEADS):
        head = tl.program_id(0) % chunks * HEADS + i
        group, slot = head // (QUERIES + 2), head % (QUERIES + 2)
        mask = tile & (row < tl.where(head < TOTAL, rows, 0))[:, None]  # the last chunk is short
        first, second = _load_halves(qkv_ptr, source + head * HEAD, mask, HALF)
        if slot == QUERIES + 1:
            offsets = (row_64 * GROUPS + group) * HEAD + r
            _store_halves(v_ptr, offsets, first, second, mask, HALF)
        else:
            turned = first * cos - second * sin
            second = second * cos + first * sin
            if slot == QUERIES:
                offsets = (row_64 * GROUPS + group) * HEAD + r
                _store_halves(k_ptr, offsets, turned, second, mask, HALF)
            else:
                offsets = (row_64 * (GROUPS * QUERIES) + group * QUERIES + slot) * HEAD + r
                _store_halves(q_ptr, offsets, turned, second, mask, HALF)


@triton.jit
def _store_fp8(rows_ptr, columns_ptr, values, scale, row, column, mask, rows, width, LIMIT):
    """Columns `column` [r] of rows `row` [m] of the gradient, as they are and transposed."""
    stored = to_fp8(values, scale, LIMIT, rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + row.to(tl.int64)[:, None] * width + column[None, :], stored, mask=mask)
    transposed = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(columns_ptr + transposed, tl.trans(stored), mask=tl.trans(mask))


@triton.jit
def _split_rope_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    amax_ptr,
    rows,
    batch,
    dq_position,
    dq_lane,
    dq_head,
    dk_position,
    dk_lane,
    dk_head,
    dv_position,
    dv_lane,
    dv_head,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    QUANTIZE: tl.constexpr,
    AMAX: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
):
    TOTAL: tl.constexpr = GROUPS * (QUERIES + 2)
    WIDTH: tl.constexpr = TOTAL * 2 * HALF
    chunks = tl.cdiv(TOTAL, HEADS)
    row = tl.program_id(0) // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    position, lane = row // batch, row % batch
    r = tl.arange(0, BLOCK_R)
    tile = (row < rows)[:, None] & (r < HALF)[None, :]
    angle = position.to(tl.int64)[:, None] * HALF + r[None, :]
    cos = tl.load(cos_ptr + angle, mask=tile, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=tile, other=0.0)
    dq_rows = _row_starts(position, lane, dq_position, dq_lane) + r[None, :]
    dk_rows = _row_starts(position, lane, dk_position, dk_lane) + r[None, :]
    dv_rows = _row_starts(position, lane, dv_position, dv_lane) + r[None, :]
    scale = 1.0
    if QUANTIZE:
        scale = tl.load(scale_ptr)
    largest = tl.zeros([BLOCK_M], tl.float32)
    for i in range(HEADS):
        head = tl.program_id(0) % chunks * HEADS + i
        group, slot = head // (QUERIES + 2), head % (QUERIES + 2)
        mask = tile & (row < tl.where(head < TOTAL, rows, 0))[:, None]  # the last chunk is short
        if slot == QUERIES + 1:
            offsets = dv_rows + group.to(tl.int64) * dv_head
            first, second = _load_halves(dv_ptr, offsets, mask, HALF)
        else:
            if slot == QUERIES:
                offsets = dk_rows + group.to(tl.int64) * dk_head
                turned, other = _load_halves(dk_ptr, offsets, mask, HALF)
            else:
                offsets = dq_rows + (group * QUERIES + slot).to(tl.int64) * dq_head
                turned, other = _load_halves(dq_ptr, offsets, mask, HALF)
            first = turned * cos + other * sin
            second = other * cos - turned * sin
        column = head * (2 * HALF) + r
        if QUANTIZE:
            _store_fp8(rows_ptr, columns_ptr, first, scale, row, column, mask, rows, WIDTH, LIMIT)
            _store_fp8(
                rows_ptr, columns_ptr, second, scale, row, column + HALF, mask, rows, WIDTH, LIMIT
            )
        else:
            # The largest of what is stored, which is what a later quantisation will see.
            first = first.to(rows_ptr.dtype.element_ty).to(tl.float32)
            second = second.to(rows_ptr.dtype.element_ty).to(tl.float32)
            offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            _store_halves(rows_ptr, offsets, first, second, mask, HALF)
        if AMAX:
            largest = tl.maximum(largest, tl.max(tl.abs(first), axis=1))
            largest = tl.maximum(largest, tl.max(tl.abs(second), axis=1))
    if AMAX:
        tl.atomic_max(amax_ptr, tl.max(largest, axis=0), sem="relaxed")


# -------------------------------------------------------------------------------- launchers


def _default_config(name: str, head_dim: int) -> LaunchConfig:
    """The first candidate, with fewer tokens where heads above 128 would spill registers."""
    config = CANDIDATES[name][0]
    return replace(
        config, block_m=max(1, config.block_m // triton.next_power_of_2(triton.cdiv(head_dim, 128)))
    )


def _launch_options(half: int, config: LaunchConfig, **constants: Any) -> dict[str, Any]:
    return {
        **constants,
        "HALF": half,
        "BLOCK_M": config.block_m,
        "BLOCK_R": triton.next_power_of_2(half),
        "HEADS": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _grid(rows: int, heads: int, config: LaunchConfig) -> tuple[int]:
    return (triton.cdiv(rows, config.block_m) * triton.cdiv(heads, config.block_n),)


def _split_rope_on_gpu(
    qkv_sbw: Tensor,
    cos_sr: Tensor,
    sin_sr: Tensor,
    groups: int,
    head_dim: int,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    s, b, width = qkv_sbw.shape
    queries = width // (groups * head_dim) - 2
    q_sbnd = qkv_sbw.new_empty((s, b, groups * queries, head_dim))
    k_sbgd = qkv_sbw.new_empty((s, b, groups, head_dim))
    v_sbgd = qkv_sbw.new_empty((s, b, groups, head_dim))
    _split_rope_kernel[_grid(s * b, groups * (queries + 2), config)](
        qkv_sbw,
        cos_sr,
        sin_sr,
        q_sbnd,
        k_sbgd,
        v_sbgd,
        s * b,
        b,
        qkv_sbw.stride(0),
        qkv_sbw.stride(1),
        **_launch_options(head_dim // 2, config, GROUPS=groups, QUERIES=queries),
    )
    return q_sbnd, k_sbgd, v_sbgd


def _split_rope_backward_on_gpu(
    gradients: tuple[Tensor, Tensor, Tensor],
    cos_sr: Tensor,
    sin_sr: Tensor,
    spec: QuantizeSpec | None,
    amax: Tensor | None,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor | None]:
    """The gradient [m, w], in FP8 with its transpose where `spec` is given."""
    dq_sbnd, dk_sbgd, dv_sbgd = gradients
    s, b, groups, head_dim = dk_sbgd.shape
    queries = dq_sbnd.size(2) // groups
    m, width = s * b, groups * (queries + 2) * head_dim
    strides: list[Any] = [stride for part in gradients for stride in part.stride()[:3]]
    dtype = spec.dtype if spec else dq_sbnd.dtype
    rows_mw = dq_sbnd.new_empty((m, width), dtype=dtype)
    columns_wm = dq_sbnd.new_empty((width, m), dtype=dtype) if spec else None
    _split_rope_backward_kernel[_grid(m, groups * (queries + 2), config)](
        dq_sbnd,
        dk_sbgd,
        dv_sbgd,
        cos_sr,
        sin_sr,
        rows_mw,
        columns_wm,
        spec.scale if spec else None,
        spec.amax if spec else amax,
        m,
        b,
        *strides,
        **_launch_options(
            head_dim // 2,
            config,
            GROUPS=groups,
            QUERIES=queries,
            QUANTIZE=spec is not None,
            AMAX=spec is not None or amax is not None,
            LIMIT=FP8_MAX[spec.dtype] if spec else 0.0,
        ),
    )
    return rows_mw, columns_wm


# --------------------------------------------------------------------------------- public


def _check_angles(positions: int, head_dim: int, cos_sr: Tensor, sin_sr: Tensor) -> None:
    if head_dim % 2:
        raise LitesparkError(f"rotary embedding turns pairs; the head size {head_dim} is odd")
    for name, angle_sr in (("cos", cos_sr), ("sin", sin_sr)):
        fits = angle_sr.shape == (positions, head_dim // 2) and angle_sr.is_contiguous()
        if not fits or angle_sr.dtype != torch.float32:
            raise LitesparkError(
                f"{name} must be a contiguous fp32 [{positions}, {head_dim // 2}]; got "
                f"{angle_sr.dtype} {tuple(angle_sr.shape)} with strides {angle_sr.stride()}"
            )


def _check_gradients(gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    dq_sbnd, dk_sbgd, dv_sbgd = gradients
    s, b, heads, head_dim = dq_sbnd.shape
    groups = dk_sbgd.size(2)
    if dk_sbgd.shape != (s, b, groups, head_dim) or dv_sbgd.shape != dk_sbgd.shape:
        raise LitesparkError(
            f"gradients of q {tuple(dq_sbnd.shape)}, k {tuple(dk_sbgd.shape)} and "
            f"v {tuple(dv_sbgd.shape)} do not belong together"
        )
    if heads % groups:
        raise LitesparkError(f"{heads} query heads do not divide into {groups} groups")
    for gradient in gradients:
        if gradient.stride(3) != 1 or gradient.dtype != dq_sbnd.dtype:
            raise LitesparkError(
                "the gradients of q, k and v must have one dtype and a contiguous last dimension; "
                f"got {gradient.dtype} with strides {gradient.stride()}"
            )


def split_rope(
    qkv_sbw: Tensor,
    cos_sr: Tensor,
    sin_sr: Tensor,
    *,
    num_groups: int,
    head_dim: int,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the QKV projection into q, k and v, with q and k rotated; see the module's text.

    Args:
        qkv_sbw: bf16, fp16 or fp32 [s, b, g*(p+2)*d], last dimension contiguous.
        cos_sr: cosines of the angles, fp32 [s, d/2], contiguous.
        sin_sr: sines, likewise.
        num_groups: g, the key/value groups of this rank.
        head_dim: d, even.
        config: block_m tokens by block_n heads a program; block_m is a power of two.

    Returns:
        q [s, b, g*p, d], k and v [s, b, g, d], contiguous, in the dtype of qkv.

    Raises:
        LitesparkError: shapes, dtypes or strides other than these.
    """
    s, _, width = qkv_sbw.shape
    _check_angles(s, head_dim, cos_sr, sin_sr)
    heads, rest = divmod(width, num_groups * head_dim)
    if rest or heads < 3:
        raise LitesparkError(
            f"a fused QKV of width {width} is not {num_groups} groups of at least one query head, "
            f"a key head and a value head of size {head_dim}"
        )
    if qkv_sbw.stride(2) != 1:
        raise LitesparkError(f"qkv's last dimension must be contiguous: {qkv_sbw.stride()}")
    if not runs_kernel(qkv_sbw):
        return _split_rope_reference(qkv_sbw, cos_sr, sin_sr, num_groups, head_dim)
    config = config or _default_config("forward", head_dim)
    return _split_rope_on_gpu(qkv_sbw, cos_sr, sin_sr, num_groups, head_dim, config)


def split_rope_backward(
    dq_sbnd: Tensor,
    dk_sbgd: Tensor,
    dv_sbgd: Tensor,
    cos_sr: Tensor,
    sin_sr: Tensor,
    *,
    quantize: QuantizeSpec | None = None,
    amax: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor | Fp8Matrix:
    """The gradient of `split_rope`'s input, as a matrix of rows in (s, b) order.

    Args:
        dq_sbnd: [s, b, g*p, d], bf16, fp16 or fp32; any strides with the last dimension contiguous.
        dk_sbgd: [s, b, g, d], likewise, same dtype.
        dv_sbgd: [s, b, g, d], likewise, same dtype.
        cos_sr: as in the forward.
        sin_sr: as in the forward.
        quantize: return the gradient in FP8, rows and columns, and raise the spec's `amax`.
        amax: without `quantize`, fp32 [1] to raise to the largest |value| returned.
        config: block_m tokens by block_n heads a program; block_m is a power of two.

    Returns:
        [s*b, g*(p+2)*d] in the gradients' dtype, or an `Fp8Matrix` of that shape, which is rounded
        once, from fp32.

    Raises:
        LitesparkError: shapes, dtypes or strides other than these, or `amax` beside `quantize`.
    """
    gradients = (dq_sbnd, dk_sbgd, dv_sbgd)
    _check_gradients(gradients)
    _check_angles(dq_sbnd.size(0), dq_sbnd.size(3), cos_sr, sin_sr)
    if quantize is not None and amax is not None:
        raise LitesparkError("split_rope_backward: `amax` comes with `quantize` already")
    if runs_kernel(dq_sbnd):
        name = "backward" if quantize is None else "backward_fp8"
        rows_mw, columns_wm = _split_rope_backward_on_gpu(
            gradients,
            cos_sr,
            sin_sr,
            quantize,
            amax,
            config or _default_config(name, dq_sbnd.size(3)),
        )
        if quantize is None:
            return rows_mw
        return Fp8Matrix(rows_mw, columns_wm, quantize.scale_inv)
    exact_mw = _split_rope_backward_reference(gradients, cos_sr, sin_sr)
    if quantize is not None:
        stored_mw = saturate(exact_mw, quantize)
        return Fp8Matrix(stored_mw, stored_mw.t().contiguous(), quantize.scale_inv)
    rounded_mw = exact_mw.to(dq_sbnd.dtype)
    if amax is not None:
        raise_amax(rounded_mw, amax)
    return rounded_mw
