"""SwiGLU and its gradient in one pass over memory each, in FP8 where FP8 products follow.

The first projection writes gate_up [m, 2f], the gate g in columns 0..f-1 and the up branch u in
columns f..2f-1 (megatron-core's order).  With sig = sigmoid(g) and silu = g sig,

    act   = silu u
    dgate = dact u (sig + silu (1 - sig))
    dup   = dact silu

element by element; everything between a load and a store is fp32.

Bytes per element of act, bf16 in: forward reads 4 and writes 1 in FP8 (2 in bf16), 1 for the
transpose and 2 for gate_up in FP8, which halves what is kept until backward.  Backward with that
reads 2 + 2 and writes dgate and dup in FP8, straight and transposed (4), and act, transposed, for
the weight gradient of the second projection (1): 9 bytes, where an activation, a quantisation and a
transpose, one after the other, would move 25.  act is computed again rather than kept: a byte is
written for it either way, and forward's would be held until here.

A program takes a tile of g, the tile of u beside it and that of dact.  All of its outputs are
computed and rounded to FP8 before the first one is stored: what has to live across the barriers of
a transpose is a quarter of the fp32 values.  Offsets within a tile have 32 bits and its origin has
64, which spares registers too.

Rows of a straight output get block_n contiguous bytes from a program, rows of a transpose block_m.
DRAM wants more at once than a tile gives to either, hence the order of the programs: `group_m`
tiles one below the other, then the next column of tiles, so that those which run at the same time
cover long pieces of both kinds of rows.

Sources: Shazeer 2020, arXiv 2002.05202, eq. 6 (the function); the gradient by the chain rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig, runs_kernel, tl, triton
from litespark.ops.formats import FP8_MAX, Fp8Matrix, QuantizeSpec, saturate
from litespark.ops.quantize import raise_to_largest, to_fp8


@dataclass(frozen=True)
class SwigluLaunch(LaunchConfig):
    """A launch over tiles of block_m of m by block_n of f, powers of two.

    Programs are numbered down `group_m` tiles, then on to the next column of tiles: 1 walks along
    the rows of the matrix, as many as there are tiles in a column down its columns.

    `max_registers` of a thread; an SM has 65536.  Compiled for an H100, a thread with 16 elements
    of a tile gets by with 64 of them and one with 32 with 128, with hardly a spill, in the kernels
    that transpose.  Left alone the compiler takes more, and fewer programs run at the same time.
    """

    group_m: int = 8
    max_registers: int | None = None


# "..._columns" are the launches that also store transposes.
CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "forward": (
        SwigluLaunch(8, 512, num_warps=8, group_m=1),
        SwigluLaunch(4, 512, num_warps=4, group_m=1),
        SwigluLaunch(8, 256, num_warps=4, group_m=1),
        SwigluLaunch(16, 256, num_warps=8, group_m=1),
        SwigluLaunch(32, 128, num_warps=8, group_m=1),
        SwigluLaunch(64, 128, num_warps=8, group_m=4),
    ),
    "forward_columns": (
        SwigluLaunch(64, 128, num_warps=8, group_m=1, max_registers=128),
        SwigluLaunch(64, 128, num_warps=8, group_m=16, max_registers=128),
        SwigluLaunch(64, 128, num_warps=16, group_m=16, max_registers=64),
        SwigluLaunch(64, 64, num_warps=4, group_m=16, max_registers=128),
        SwigluLaunch(64, 64, num_warps=8, group_m=16, max_registers=64),
        SwigluLaunch(128, 64, num_warps=8, group_m=8, max_registers=128),
        SwigluLaunch(128, 64, num_warps=16, group_m=8, max_registers=64),
        SwigluLaunch(64, 128, num_warps=8, group_m=256, max_registers=128),
    ),
    "backward": (
        SwigluLaunch(8, 256, num_warps=4, group_m=1),
        SwigluLaunch(4, 512, num_warps=4, group_m=1),
        SwigluLaunch(8, 512, num_warps=8, group_m=1),
        SwigluLaunch(16, 256, num_warps=8, group_m=1),
        SwigluLaunch(32, 128, num_warps=8, group_m=1),
    ),
    "backward_columns": (
        SwigluLaunch(64, 128, num_warps=16, group_m=16, max_registers=64),
        SwigluLaunch(64, 128, num_warps=16, group_m=1, max_registers=64),
        SwigluLaunch(64, 128, num_warps=8, group_m=16, max_registers=128),
        SwigluLaunch(64, 64, num_warps=4, group_m=16, max_registers=128),
        SwigluLaunch(64, 64, num_warps=8, group_m=16, max_registers=64),
        SwigluLaunch(128, 64, num_warps=8, group_m=8, max_registers=128),
        SwigluLaunch(128, 64, num_warps=16, group_m=8, max_registers=64),
        SwigluLaunch(64, 128, num_warps=8, group_m=1, max_registers=128),
        SwigluLaunch(64, 128, num_warps=8, group_m=256, max_registers=128),
    ),
}

# A tile of at most 128 rows or columns is addressed in 32 bits up to this row size.
LARGEST_SIDE = 2**24

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class SwigluOutput:
    """What forward computed.

    `activation` is act [m, f], or its FP8 rows (and columns where they were asked for); `stored` is
    gate_up [m, 2f] in FP8 rows, which backward takes in its place, where it was asked for.
    """

    activation: Tensor | Fp8Matrix
    stored: Fp8Matrix | None


@dataclass(frozen=True)
class SwigluGradients:
    """What backward computed.

    `dgate_up` is the gradient of gate_up [m, 2f], or its FP8 rows and columns; `activation` is act
    [m, f] or its FP8 columns [f, m], where either was asked for.
    """

    dgate_up: Tensor | Fp8Matrix
    activation: Tensor | Fp8Matrix | None


# ------------------------------------------------------------------------------- references


def _values(gate_up: Tensor | Fp8Matrix) -> Tensor:
    """In fp32 [m, 2f]."""
    return gate_up.dequantize() if isinstance(gate_up, Fp8Matrix) else gate_up.float()


def _raise_amax(amax: Tensor | None, values: Tensor) -> None:
    if amax is not None:
        torch.maximum(amax, values.abs().amax().float().reshape(1), out=amax)


def _fp8_reference(values: Tensor, spec: QuantizeSpec, rows: bool, columns: bool) -> Fp8Matrix:
    stored = saturate(values, spec)
    return Fp8Matrix(
        stored if rows else None, stored.t().contiguous() if columns else None, spec.scale_inv
    )


def _forward_reference(
    gate_up: Tensor | Fp8Matrix,
    quantize: QuantizeSpec | None,
    columns: bool,
    store: QuantizeSpec | None,
    amax: Tensor | None,
    dtype: torch.dtype,
    input_amax: Tensor | None,
) -> SwigluOutput:
    values = _values(gate_up)
    _raise_amax(input_amax, values)
    stored = None if store is None else _fp8_reference(values, store, rows=True, columns=False)
    gate, up = values.chunk(2, dim=1)
    activation = gate * torch.sigmoid(gate) * up
    if quantize is not None:
        return SwigluOutput(_fp8_reference(activation, quantize, True, columns), stored)
    activation = activation.to(dtype)
    _raise_amax(amax, activation)
    return SwigluOutput(activation, stored)


def _backward_reference(
    dact: Tensor,
    gate_up: Tensor | Fp8Matrix,
    quantize: QuantizeSpec | None,
    activation_spec: QuantizeSpec | None,
    recompute: bool,
    amax: Tensor | None,
) -> SwigluGradients:
    gate, up = _values(gate_up).chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dact.float() * up * (sigmoid + silu * (1 - sigmoid))
    dgate_up = torch.cat([dgate, dact.float() * silu], dim=1)
    activation: Tensor | Fp8Matrix | None = None
    if recompute:
        activation = (silu * up).to(dact.dtype)
    if activation_spec is not None:  # forward has seen to its amax
        unseen = replace(activation_spec, amax=torch.zeros_like(activation_spec.amax))
        activation = _fp8_reference(silu * up, unseen, rows=False, columns=True)
    if quantize is not None:
        return SwigluGradients(_fp8_reference(dgate_up, quantize, True, True), activation)
    dgate_up = dgate_up.to(dact.dtype)
    _raise_amax(amax, dgate_up)
    return SwigluGradients(dgate_up, activation)


# ---------------------------------------------------------------------------------- kernels
# A pointer that is None takes its part of a kernel away when the kernel is compiled.


@triton.jit
def _origin(m, f, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, GROUP_M: tl.constexpr) -> Any:
    """First row and first column of this program's tile, in the order of `SwigluLaunch`."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    group_size = tl.cdiv(f, BLOCK_F) * GROUP_M
    group = tl.program_id(0) // group_size
    within = tl.program_id(0) % group_size
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return (group * GROUP_M + within % height) * BLOCK_M, within // height * BLOCK_F


@triton.jit
def _tile(pointer, row, column, row_size, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> Any:
    """Pointers to a tile whose first element is (row, column) of a matrix [.., row_size]."""
    pointer += row.to(tl.int64) * row_size + column
    return pointer + (tl.arange(0, ROWS)[:, None] * row_size + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _inside(rows_left, columns_left, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> Any:
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return (rows < rows_left)[:, None] & (columns < columns_left)[None, :]


@triton.jit
def _gate_and_up(
    gate_up_ptr, scale_inv_ptr, row, column, f, mask, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr
) -> Any:
    """A tile of g and the one of u in fp32; 0 outside the matrix."""
    gate_ptr = _tile(gate_up_ptr, row, column, 2 * f, BLOCK_M, BLOCK_F)
    up_ptr = _tile(gate_up_ptr, row, column + f, 2 * f, BLOCK_M, BLOCK_F)
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
    if scale_inv_ptr is not None:
        scale_inv = tl.load(scale_inv_ptr)
        gate *= scale_inv
        up *= scale_inv
    return gate, up


@triton.jit
def _sigmoid(x) -> Any:
    """1 / (1 + exp(-x)), within 2^-17 of it.

    Division and the plain exponential each take a few instructions to deal with numbers near the
    ends of fp32's range, a fifth of the whole backward; these two compile to one each.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def _swiglu_forward_kernel(
    gate_up_ptr,
    scale_inv_ptr,
    activation_ptr,
    columns_ptr,
    stored_ptr,
    scale_ptr,
    amax_ptr,
    store_scale_ptr,
    store_amax_ptr,
    input_amax_ptr,
    m,
    f,
    LIMIT: tl.constexpr,
    STORE_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    row, column = _origin(m, f, BLOCK_M, BLOCK_F, GROUP_M)
    mask = _inside(m - row, f - column, BLOCK_M, BLOCK_F)
    gate, up = _gate_and_up(gate_up_ptr, scale_inv_ptr, row, column, f, mask, BLOCK_M, BLOCK_F)
    activation = gate * _sigmoid(gate) * up
    if scale_ptr is not None:
        rounded = to_fp8(activation, tl.load(scale_ptr), LIMIT, activation_ptr.dtype.element_ty)
    else:
        rounded = activation.to(activation_ptr.dtype.element_ty)
        activation = rounded.to(tl.float32)
    if amax_ptr is not None:
        raise_to_largest(amax_ptr, activation)
    largest = tl.maximum(tl.abs(gate), tl.abs(up))
    if input_amax_ptr is not None:
        raise_to_largest(input_amax_ptr, largest)
    if stored_ptr is not None:
        raise_to_largest(store_amax_ptr, largest)
        scale = tl.load(store_scale_ptr)
        stored_gate = to_fp8(gate, scale, STORE_LIMIT, stored_ptr.dtype.element_ty)
        stored_up = to_fp8(up, scale, STORE_LIMIT, stored_ptr.dtype.element_ty)
        gate_ptr = _tile(stored_ptr, row, column, 2 * f, BLOCK_M, BLOCK_F)
        up_ptr = _tile(stored_ptr, row, column + f, 2 * f, BLOCK_M, BLOCK_F)
        tl.store(gate_ptr, stored_gate, mask=mask)
        tl.store(up_ptr, stored_up, mask=mask)
    tl.store(_tile(activation_ptr, row, column, f, BLOCK_M, BLOCK_F), rounded, mask=mask)
    if columns_ptr is not None:
        columns_mask = _inside(f - column, m - row, BLOCK_F, BLOCK_M)
        columns_ptrs = _tile(columns_ptr, column, row, m, BLOCK_F, BLOCK_M)
        tl.store(columns_ptrs, tl.trans(rounded), mask=columns_mask)


@triton.jit
def _swiglu_backward_kernel(
    dact_ptr,
    gate_up_ptr,
    scale_inv_ptr,
    dgate_up_ptr,
    dcolumns_ptr,
    activation_ptr,
    activation_columns_ptr,
    scale_ptr,
    amax_ptr,
    activation_scale_ptr,
    m,
    f,
    LIMIT: tl.constexpr,
    ACTIVATION_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    row, column = _origin(m, f, BLOCK_M, BLOCK_F, GROUP_M)
    mask = _inside(m - row, f - column, BLOCK_M, BLOCK_F)
    columns_mask = _inside(f - column, m - row, BLOCK_F, BLOCK_M)
    gate, up = _gate_and_up(gate_up_ptr, scale_inv_ptr, row, column, f, mask, BLOCK_M, BLOCK_F)
    dact_ptrs = _tile(dact_ptr, row, column, f, BLOCK_M, BLOCK_F)
    dact = tl.load(dact_ptrs, mask=mask, other=0.0).to(tl.float32)

    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    activation = silu * up
    dgate = dact * up * (sigmoid + silu * (1.0 - sigmoid))
    dup = dact * silu
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        rounded_dgate = to_fp8(dgate, scale, LIMIT, dgate_up_ptr.dtype.element_ty)
        rounded_dup = to_fp8(dup, scale, LIMIT, dgate_up_ptr.dtype.element_ty)
    else:
        rounded_dgate = dgate.to(dgate_up_ptr.dtype.element_ty)
        rounded_dup = dup.to(dgate_up_ptr.dtype.element_ty)
        dgate = rounded_dgate.to(tl.float32)
        dup = rounded_dup.to(tl.float32)
    if amax_ptr is not None:
        raise_to_largest(amax_ptr, tl.maximum(tl.abs(dgate), tl.abs(dup)))
    if activation_columns_ptr is not None:
        scale = tl.load(activation_scale_ptr)
        element = activation_columns_ptr.dtype.element_ty
        activation = to_fp8(activation, scale, ACTIVATION_LIMIT, element)

    dgate_ptrs = _tile(dgate_up_ptr, row, column, 2 * f, BLOCK_M, BLOCK_F)
    dup_ptrs = _tile(dgate_up_ptr, row, column + f, 2 * f, BLOCK_M, BLOCK_F)
    tl.store(dgate_ptrs, rounded_dgate, mask=mask)
    tl.store(dup_ptrs, rounded_dup, mask=mask)
    if activation_ptr is not None:
        ptrs = _tile(activation_ptr, row, column, f, BLOCK_M, BLOCK_F)
        tl.store(ptrs, activation.to(activation_ptr.dtype.element_ty), mask=mask)
    if activation_columns_ptr is not None:
        ptrs = _tile(activation_columns_ptr, column, row, m, BLOCK_F, BLOCK_M)
        tl.store(ptrs, tl.trans(activation), mask=columns_mask)
    if dcolumns_ptr is not None:
        dgate_ptrs = _tile(dcolumns_ptr, column, row, m, BLOCK_F, BLOCK_M)
        dup_ptrs = _tile(dcolumns_ptr, column + f, row, m, BLOCK_F, BLOCK_M)
        tl.store(dgate_ptrs, tl.trans(rounded_dgate), mask=columns_mask)
        tl.store(dup_ptrs, tl.trans(rounded_dup), mask=columns_mask)


# -------------------------------------------------------------------------------- launchers


def _launch(name: str, config: LaunchConfig | None, m: int, f: int) -> tuple[Any, dict[str, Any]]:
    """Grid and options of a launch; `name` is the key of the default in `CANDIDATES`."""
    config = config or CANDIDATES[name][0]
    order = config if isinstance(config, SwigluLaunch) else SwigluLaunch(1, 1)
    options: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_F": config.block_n,
        "GROUP_M": order.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if order.max_registers is not None:
        options["maxnreg"] = order.max_registers
    return (triton.cdiv(m, config.block_m) * triton.cdiv(f, config.block_n),), options


def _limit(spec: QuantizeSpec | None) -> float:
    return 0.0 if spec is None else FP8_MAX[spec.dtype]


def _parts(gate_up: Tensor | Fp8Matrix) -> tuple[Tensor, Tensor | None]:
    """What the kernels read: the stored matrix [m, 2f], and its inverse scale where it has one."""
    if not isinstance(gate_up, Fp8Matrix):
        return gate_up, None
    if gate_up.rows_mk is None:
        raise LitesparkError("swiglu: gate_up in FP8 is read by rows, and has columns only")
    return gate_up.rows_mk, gate_up.scale_inv


def _forward_on_gpu(
    gate_up: Tensor | Fp8Matrix,
    quantize: QuantizeSpec | None,
    columns: bool,
    store: QuantizeSpec | None,
    amax: Tensor | None,
    dtype: torch.dtype,
    input_amax: Tensor | None,
    config: LaunchConfig | None,
) -> SwigluOutput:
    values, scale_inv = _parts(gate_up)
    m, f = values.size(0), values.size(1) // 2
    activation = values.new_empty((m, f), dtype=quantize.dtype if quantize else dtype)
    columns_fm = values.new_empty((f, m), dtype=activation.dtype) if columns else None
    stored = values.new_empty((m, 2 * f), dtype=store.dtype) if store else None
    grid, options = _launch("forward_columns" if columns else "forward", config, m, f)
    options |= {"LIMIT": _limit(quantize), "STORE_LIMIT": _limit(store)}
    _swiglu_forward_kernel[grid](
        values,
        scale_inv,
        activation,
        columns_fm,
        stored,
        quantize.scale if quantize else None,
        quantize.amax if quantize else amax,
        store.scale if store else None,
        store.amax if store else None,
        input_amax,
        m,
        f,
        **options,
    )
    return SwigluOutput(
        Fp8Matrix(activation, columns_fm, quantize.scale_inv) if quantize else activation,
        Fp8Matrix(stored, None, store.scale_inv) if store else None,
    )


def _backward_on_gpu(
    dact: Tensor,
    gate_up: Tensor | Fp8Matrix,
    quantize: QuantizeSpec | None,
    activation_spec: QuantizeSpec | None,
    recompute: bool,
    amax: Tensor | None,
    config: LaunchConfig | None,
) -> SwigluGradients:
    values, scale_inv = _parts(gate_up)
    m, f = dact.shape
    rows = dact.new_empty((m, 2 * f), dtype=quantize.dtype if quantize else dact.dtype)
    columns = dact.new_empty((2 * f, m), dtype=quantize.dtype) if quantize else None
    activation = torch.empty_like(dact) if recompute else None
    activation_columns = (
        dact.new_empty((f, m), dtype=activation_spec.dtype) if activation_spec else None
    )
    transposes = quantize is not None or activation_spec is not None
    grid, options = _launch("backward_columns" if transposes else "backward", config, m, f)
    options |= {"LIMIT": _limit(quantize), "ACTIVATION_LIMIT": _limit(activation_spec)}
    _swiglu_backward_kernel[grid](
        dact,
        values,
        scale_inv,
        rows,
        columns,
        activation,
        activation_columns,
        quantize.scale if quantize else None,
        quantize.amax if quantize else amax,
        activation_spec.scale if activation_spec else None,
        m,
        f,
        **options,
    )
    return SwigluGradients(
        Fp8Matrix(rows, columns, quantize.scale_inv) if quantize else rows,
        Fp8Matrix(None, activation_columns, activation_spec.scale_inv)
        if activation_spec
        else activation,
    )


# --------------------------------------------------------------------------------- public


def _check(gate_up: Tensor, dact: Tensor | None = None) -> None:
    m, width = gate_up.shape if gate_up.dim() == 2 else (0, 1)
    if width % 2 or not gate_up.is_contiguous() or max(m, width) >= LARGEST_SIDE:
        raise LitesparkError(
            "swiglu: gate_up must be a contiguous matrix [m, 2f] with sides below 2^24; got shape "
            f"{tuple(gate_up.shape)} with strides {gate_up.stride()}"
        )
    if dact is not None and (dact.shape != (m, width // 2) or not dact.is_contiguous()):
        raise LitesparkError(
            f"swiglu: dact must be a contiguous matrix {(m, width // 2)}; got shape "
            f"{tuple(dact.shape)} with strides {dact.stride()}"
        )


def swiglu(
    gate_up: Tensor | Fp8Matrix,
    *,
    quantize: QuantizeSpec | None = None,
    columns: bool = False,
    store: QuantizeSpec | None = None,
    amax: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    input_amax: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> SwigluOutput:
    """act = silu(g) * u in one pass (arXiv 2002.05202, eq. 6), in FP8 where `quantize` says so.

    Args:
        gate_up: g beside u, contiguous [m, 2f]: bf16, fp16 or fp32, or FP8 rows.
        quantize: return act as FP8 rows; its amax is raised to the largest |act|.
        columns: the transpose [f, m] of these too.
        store: return gate_up as FP8 rows too, for backward; its amax is raised likewise.
        amax: fp32 [1], raised to the largest |act| returned, where act is not quantised.
        out_dtype: act's dtype if gate_up is FP8 and act is not; otherwise it is gate_up's.
        input_amax: fp32 [1], raised to the largest |value| of gate_up, dequantised if it is FP8.
        config: the launch; see `SwigluLaunch`.

    Raises:
        LitesparkError: gate_up of another layout, or options that exclude one another.
    """
    values, _ = _parts(gate_up)
    _check(values)
    if quantize is None and columns:
        raise LitesparkError("swiglu: columns are those of the FP8 activation; give `quantize`")
    if quantize is not None and amax is not None:
        raise LitesparkError("swiglu: the spec in `quantize` has an amax; give no other")
    dtype = out_dtype if isinstance(gate_up, Fp8Matrix) else gate_up.dtype
    options = (quantize, columns, store, amax, dtype, input_amax)
    if runs_kernel(values):
        return _forward_on_gpu(gate_up, *options, config)
    return _forward_reference(gate_up, *options)


def swiglu_backward(
    dact_mf: Tensor,
    gate_up: Tensor | Fp8Matrix,
    *,
    quantize: QuantizeSpec | None = None,
    activation_spec: QuantizeSpec | None = None,
    recompute: bool = False,
    amax: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> SwigluGradients:
    """Gradient of gate_up, and act once more for the next weight gradient, in one pass.

    Args:
        dact_mf: act's gradient, contiguous [m, f], bf16, fp16 or fp32.
        gate_up: what `swiglu` was given, or what it stored.
        quantize: return the gradient as FP8 rows and columns; its amax is raised to the largest
            |gradient|.  Without it the gradient has dact's dtype.
        activation_spec: return act as FP8 columns [f, m]; its amax is left alone.
        recompute: return act [m, f] in dact's dtype.
        amax: fp32 [1], raised to the largest |gradient| returned, where that is not quantised.
        config: the launch; see `SwigluLaunch`.

    Raises:
        LitesparkError: matrices of another layout, or options that exclude one another.
    """
    values, _ = _parts(gate_up)
    _check(values, dact_mf)
    if recompute and activation_spec is not None:
        raise LitesparkError("swiglu: `recompute` and `activation_spec` exclude one another")
    if quantize is not None and amax is not None:
        raise LitesparkError("swiglu: the spec in `quantize` has an amax; give no other")
    options = (quantize, activation_spec, recompute, amax)
    if runs_kernel(values):
        return _backward_on_gpu(dact_mf, gate_up, *options, config)
    return _backward_reference(dact_mf, gate_up, *options)
