"""Blockwise FP8: one scale for each short tile of a row, or for each square block of a weight.

One scale for a whole matrix is set by its largest element; an outlier pushes the small elements of
E4M3's 18 binary orders of magnitude below its smallest number.  DeepSeek-V3's recipe confines an
outlier to its neighbourhood, with every operand in E4M3, gradients too:

    activations and gradients  a scale for each 1 x 128 tile along the inner dimension
    weights                    a scale for each 128 x 128 block

    scale = max |tile| / 448, rounded up to a power of two where asked   (stored ~ value / scale)

With power-of-two scales dividing is exact, so that quantising costs one rounding only, and a value
is the same FP8 number under two scales unless one of them is too coarse for it.

A matrix [m, k] that is multiplied from both sides is stored twice: its rows with tiles along k and
its transpose with tiles along m, which have other scales.  A 128 x 128 block is its own transpose's
block: there the numbers and scales agree.  Of memory a kernel reads a 128 x 128 block once and
writes both (2 bytes read, 1 + 1 written a value, and 1/16 of that in scales).

Sizes that are not multiples of 128 are allowed everywhere: the last tile of a row is short, and has
a scale of its own like every other.  Nothing is padded, but for the memory of block scales.

An all-zero tile has scale 1.  A NaN stays NaN and does not count in its tile's maximum.  A tile
with an infinity has an infinite scale and so becomes NaN as a whole.

Layouts of the scales are those of torch's `scaled_mm` on Hopper, which hands them to cuBLASLt 12.9
or newer: 1 x 128 scales [m, ceil(k/128)] with m contiguous; 128 x 128 scales
[ceil(m/128), ceil(k/128)] with the inner blocks contiguous and padded to a multiple of 4.

Source: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig, runs_kernel, tl, triton
from litespark.ops.formats import E4M3, FP8_MAX
from litespark.ops.quantize import tile, tile_options, tiles, to_fp8

TILE = 128
LIMIT = FP8_MAX[E4M3]
# A scale's reciprocal must be finite and normal.
SMALLEST_SCALE = 2.0**-126

# Of tiles a program takes `block_n` rows or columns of a 128 x 128 block, of blocks a whole one.
CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "tiles": (
        LaunchConfig(TILE, 64, num_warps=4),
        LaunchConfig(TILE, 32, num_warps=4),
        LaunchConfig(TILE, 32, num_warps=2),
        LaunchConfig(TILE, 64, num_warps=8),
        LaunchConfig(TILE, TILE, num_warps=8),
        LaunchConfig(TILE, TILE, num_warps=4),
    ),
    "blocks": (
        LaunchConfig(TILE, TILE, num_warps=8),
        LaunchConfig(TILE, TILE, num_warps=16),
        LaunchConfig(TILE, TILE, num_warps=4),
    ),
}


@dataclass(frozen=True)
class BlockScaledOperand:
    """One side of a product: a matrix [m, k] in E4M3 and the scales of its tiles along k.

    value = stored * scale.  `values_mk` is contiguous.  `tile_rows` is 1 with fp32 `scales`
    [m, ceil(k/128)], m contiguous; or 128 with [ceil(m/128), ceil(k/128) rounded up to a multiple
    of 4], contiguous, the excess columns 1.
    """

    values_mk: Tensor
    scales: Tensor
    tile_rows: int

    def dequantize(self) -> Tensor:
        """The matrix in fp32 [m, k]."""
        m, k = self.values_mk.shape
        scales = self.scales
        if self.tile_rows > 1:
            scales = scales.repeat_interleave(self.tile_rows, dim=0)[:m]
        return self.values_mk.float() * scales.repeat_interleave(TILE, dim=1)[:, :k]


@dataclass(frozen=True)
class BlockScaledMatrix:
    """A matrix [m, k] in E4M3 with a scale a tile, row by row and/or transposed.

    `rows_mk` with `row_scales` and `columns_km` with `column_scales` are each laid out as in
    `BlockScaledOperand`; an orientation that was not asked for is None.
    """

    rows_mk: Tensor | None
    row_scales: Tensor | None
    columns_km: Tensor | None
    column_scales: Tensor | None
    tile_rows: int

    def rows(self) -> BlockScaledOperand:
        """The matrix as a side of a product over k.

        Raises:
            LitesparkError: the rows were not asked for.
        """
        if self.rows_mk is None or self.row_scales is None:
            raise LitesparkError("the matrix was quantised without rows")
        return BlockScaledOperand(self.rows_mk, self.row_scales, self.tile_rows)

    def columns(self) -> BlockScaledOperand:
        """The transpose [k, m] as a side of a product over m.

        Raises:
            LitesparkError: the columns were not asked for.
        """
        if self.columns_km is None or self.column_scales is None:
            raise LitesparkError("the matrix was quantised without columns")
        return BlockScaledOperand(self.columns_km, self.column_scales, self.tile_rows)


# ------------------------------------------------------------------------------- references


def _scales_reference(amax: Tensor, power_of_two: bool) -> Tensor:
    # A Python number as divisor is multiplied in as a reciprocal on CUDA, which is not exact.
    scales = (amax / torch.full_like(amax, LIMIT)).clamp(min=SMALLEST_SCALE)
    if power_of_two:  # adding all ones below the exponent carries into it unless they are zero
        bits = (scales.view(torch.int32) + 0x007FFFFF) & 0x7F800000
        scales = bits.view(torch.float32)
    return torch.where(amax == 0, 1.0, scales)


def _quantize_reference(x_mk: Tensor, tile_rows: int, power_of_two: bool) -> BlockScaledOperand:
    m, k = x_mk.shape
    x = x_mk.float()
    magnitude = x.abs().nan_to_num(nan=0.0, posinf=torch.inf)
    magnitude = F.pad(magnitude, (0, -k % TILE, 0, -m % tile_rows))
    amax = magnitude.unflatten(1, (-1, TILE)).unflatten(0, (-1, tile_rows)).amax(dim=(1, 3))
    scales = _scales_reference(amax, power_of_two)
    spread = scales.repeat_interleave(tile_rows, dim=0)[:m].repeat_interleave(TILE, dim=1)[:, :k]
    values_mk = (x * (1.0 / spread)).clamp(-LIMIT, LIMIT).to(E4M3)
    if tile_rows == 1:
        return BlockScaledOperand(values_mk, scales.t().contiguous().t(), tile_rows)
    padding = -scales.size(1) % 4
    return BlockScaledOperand(values_mk, F.pad(scales, (0, padding), value=1.0), tile_rows)


def _matrix_reference(
    x_mk: Tensor, tile_rows: int, power_of_two: bool, rows: bool, columns: bool
) -> BlockScaledMatrix:
    straight = _quantize_reference(x_mk, tile_rows, power_of_two) if rows else None
    transposed = _quantize_reference(x_mk.t(), tile_rows, power_of_two) if columns else None
    return BlockScaledMatrix(
        rows_mk=straight.values_mk if straight else None,
        row_scales=straight.scales if straight else None,
        columns_km=transposed.values_mk.contiguous() if transposed else None,
        column_scales=transposed.scales if transposed else None,
        tile_rows=tile_rows,
    )


# ---------------------------------------------------------------------------------- kernels


@triton.jit
def _scale_of(amax, LIMIT: tl.constexpr, SMALLEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of a tile and its reciprocal; the numbers of `_scales_reference`.

    Divisions are slow, and every thread does them for each column that it holds.  The smallest
    power of two that is at least amax / 448 needs none: 448 is 1.75 * 2^8, so that its exponent is
    that of amax less 8, plus one where the mantissa of amax is above 1.75, that is, where adding
    0x1FFFFF carries into the exponent.  The exponent fields of a power of two and its reciprocal
    add up to 254.
    """
    if POWER_OF_TWO:
        bits = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000) - (8 << 23)
        bits = tl.maximum(bits, 1 << 23)
        infinite = amax == float("inf")
        scale = tl.where(infinite, amax, bits.to(tl.float32, bitcast=True))
        reciprocal = (0x7F000000 - bits).to(tl.float32, bitcast=True)
        reciprocal = tl.where(infinite, 0.0, reciprocal)
    else:
        scale = tl.maximum(tl.div_rn(amax, LIMIT), SMALLEST)
        reciprocal = tl.div_rn(1.0, scale)
    return tl.where(amax == 0.0, 1.0, scale), tl.where(amax == 0.0, 1.0, reciprocal)


@triton.jit
def _magnitude(x):
    """|x|, and 0 where x is NaN: whether a maximum passes NaN on differs between machines."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def _quantize_strip(
    x_ptr,
    out_ptr,
    scales_ptr,
    line,
    place,
    tile_index,
    num_lines,
    line_length,
    line_stride,
    place_stride,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile of each of some lines: a line is a row of the matrix, or a column."""
    line_64, place_64 = line.to(tl.int64), place.to(tl.int64)
    offsets = line_64[:, None] * line_stride + place_64[None, :] * place_stride
    mask = (line < num_lines)[:, None] & (place < line_length)[None, :]
    if EVEN:
        x = tl.load(x_ptr + offsets).to(tl.float32)
    else:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    amax = tl.max(_magnitude(x), axis=1)
    scale, reciprocal = _scale_of(amax, LIMIT, SMALLEST, POWER_OF_TWO)
    stored = to_fp8(x, reciprocal[:, None], LIMIT, out_ptr.dtype.element_ty)
    at = line_64[:, None] * line_length + place_64[None, :]
    scale_at = tile_index.to(tl.int64) * num_lines + line
    if EVEN:
        tl.store(scales_ptr + scale_at, scale)
        tl.store(out_ptr + at, stored)
    else:
        tl.store(scales_ptr + scale_at, scale, mask=line < num_lines)
        tl.store(out_ptr + at, stored, mask=mask)


@triton.jit
def _quantize_tiles_kernel(
    x_ptr,
    rows_ptr,
    row_scales_ptr,
    columns_ptr,
    column_scales_ptr,
    m,
    k,
    row_stride,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program takes BLOCK_K rows, or BLOCK_K columns, of a block of BLOCK_M = 128 squared.

    A block's rows and its columns are quantised by neighbouring programs, of which the second reads
    from the L2 cache.  One program for both has to turn the block around in registers, or keep too
    many of them for as many programs on an SM as hide the wait for the largest value.
    """
    PARTS: tl.constexpr = BLOCK_M // BLOCK_K
    ROW_PARTS: tl.constexpr = PARTS * (1 if ROWS else 0)
    ALL_PARTS: tl.constexpr = ROW_PARTS + PARTS * (1 if COLUMNS else 0)
    block, part = tl.program_id(0) // ALL_PARTS, tl.program_id(0) % ALL_PARTS
    blocks_k = tl.cdiv(k, BLOCK_M)
    block_m, block_k = block // blocks_k, block % blocks_k
    strip, whole = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    # Nested, since `and` does not keep what the other orientation, without pointers, compiles to.
    if ROWS:  # noqa: SIM102
        if part < ROW_PARTS:
            _quantize_strip(
                x_ptr,
                rows_ptr,
                row_scales_ptr,
                block_m * BLOCK_M + part * BLOCK_K + strip,
                block_k * BLOCK_M + whole,
                block_k,
                m,
                k,
                row_stride,
                1,
                LIMIT,
                SMALLEST,
                POWER_OF_TWO,
                EVEN,
            )
    if COLUMNS:  # noqa: SIM102
        if part >= ROW_PARTS:
            _quantize_strip(
                x_ptr,
                columns_ptr,
                column_scales_ptr,
                block_k * BLOCK_M + (part - ROW_PARTS) * BLOCK_K + strip,
                block_m * BLOCK_M + whole,
                block_m,
                k,
                m,
                1,
                row_stride,
                LIMIT,
                SMALLEST,
                POWER_OF_TWO,
                EVEN,
            )


@triton.jit
def _quantize_blocks_kernel(
    w_ptr,
    rows_ptr,
    row_scales_ptr,
    columns_ptr,
    column_scales_ptr,
    n,
    k,
    row_stride,
    row_scales_pitch,
    column_scales_pitch,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column, mask = tile(n, k, BLOCK_M, BLOCK_K)
    row_64, column_64 = row.to(tl.int64), column.to(tl.int64)
    offsets = row_64[:, None] * row_stride + column[None, :]
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scale, reciprocal = _scale_of(tl.max(_magnitude(w)), LIMIT, SMALLEST, POWER_OF_TWO)
    block_n = tl.program_id(0) // tl.cdiv(k, BLOCK_K)
    block_k = tl.program_id(0) % tl.cdiv(k, BLOCK_K)
    tl.store(row_scales_ptr + block_n.to(tl.int64) * row_scales_pitch + block_k, scale)
    tl.store(column_scales_ptr + block_k.to(tl.int64) * column_scales_pitch + block_n, scale)
    stored = to_fp8(w, reciprocal, LIMIT, rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + row_64[:, None] * k + column[None, :], stored, mask=mask)
    transposed = column_64[:, None] * n + row[None, :]
    tl.store(columns_ptr + transposed, tl.trans(stored), mask=tl.trans(mask))


# -------------------------------------------------------------------------------- launchers


def _quantize_tiles_on_gpu(
    x_mk: Tensor, power_of_two: bool, rows: bool, columns: bool, config: LaunchConfig
) -> BlockScaledMatrix:
    m, k = x_mk.shape
    rows_mk = row_scales = columns_km = column_scales = None
    if rows:
        rows_mk = x_mk.new_empty((m, k), dtype=E4M3)
        row_scales = x_mk.new_empty((triton.cdiv(k, TILE), m), dtype=torch.float32).t()
    if columns:
        columns_km = x_mk.new_empty((k, m), dtype=E4M3)
        column_scales = x_mk.new_empty((triton.cdiv(m, TILE), k), dtype=torch.float32).t()
    programs = triton.cdiv(m, TILE) * triton.cdiv(k, TILE) * (TILE // config.block_n)
    _quantize_tiles_kernel[(programs * (rows + columns),)](
        x_mk,
        rows_mk,
        row_scales,
        columns_km,
        column_scales,
        m,
        k,
        x_mk.stride(0),
        **tile_options(
            config,
            LIMIT=LIMIT,
            SMALLEST=SMALLEST_SCALE,
            POWER_OF_TWO=power_of_two,
            EVEN=m % TILE == 0 and k % TILE == 0,  # masks would cost a fifth of the time
            ROWS=rows,
            COLUMNS=columns,
        ),
    )
    return BlockScaledMatrix(rows_mk, row_scales, columns_km, column_scales, tile_rows=1)


def _block_scales(w: Tensor, rows: int, columns: int) -> Tensor:
    """Room for the scales of blocks; ones, so that the excess is defined."""
    pitch = triton.cdiv(triton.cdiv(columns, TILE), 4) * 4
    return w.new_ones((triton.cdiv(rows, TILE), pitch), dtype=torch.float32)


def _quantize_blocks_on_gpu(
    w_nk: Tensor, power_of_two: bool, config: LaunchConfig
) -> BlockScaledMatrix:
    n, k = w_nk.shape
    rows_nk, columns_kn = (w_nk.new_empty(shape, dtype=E4M3) for shape in ((n, k), (k, n)))
    row_scales, column_scales = _block_scales(w_nk, n, k), _block_scales(w_nk, k, n)
    _quantize_blocks_kernel[tiles(n, k, config)](
        w_nk,
        rows_nk,
        row_scales,
        columns_kn,
        column_scales,
        n,
        k,
        w_nk.stride(0),
        row_scales.stride(0),
        column_scales.stride(0),
        **tile_options(config, LIMIT=LIMIT, SMALLEST=SMALLEST_SCALE, POWER_OF_TWO=power_of_two),
    )
    return BlockScaledMatrix(rows_nk, row_scales, columns_kn, column_scales, tile_rows=TILE)


def _torch_multiplies(a: BlockScaledOperand, b: BlockScaledOperand) -> bool:
    """Whether torch's `scaled_mm` takes these operands.

    Only Hopper's cuBLASLt has these scales, and not on both sides in blocks.  FP8 products need k
    and n in multiples of 16, and 1 x 128 scales need rows of 16 bytes, so m in multiples of 4; a
    short last tile along k is left to the other path, since cuBLAS does not promise to take one.
    """
    values = a.values_mk
    if not values.is_cuda or torch.version.cuda is None or not hasattr(F, "scaled_mm"):
        return False
    if tuple(int(part) for part in torch.version.cuda.split(".")[:2]) < (12, 9):
        return False
    m, k, n = a.values_mk.size(0), a.values_mk.size(1), b.values_mk.size(0)
    fits = m % 4 == 0 and n % 16 == 0 and k % TILE == 0 and min(m, n, k) > 0
    on_hopper = torch.cuda.get_device_capability(values.device)[0] == 9
    return fits and on_hopper and not (a.tile_rows == b.tile_rows == TILE)


def _torch_scales(operand: BlockScaledOperand) -> tuple[Tensor, Any]:
    """Scales and recipe as `scaled_mm` wants them; block scales are [blocks of k, blocks of m]."""
    if operand.tile_rows == 1:
        return operand.scales, F.ScalingType.BlockWise1x128
    return operand.scales.t(), F.ScalingType.BlockWise128x128


def _torch_product(a: BlockScaledOperand, b: BlockScaledOperand, out_dtype: torch.dtype) -> Tensor:
    a_scales, a_recipe = _torch_scales(a)
    b_scales, b_recipe = _torch_scales(b)
    return F.scaled_mm(
        a.values_mk,
        b.values_mk.t(),
        a_scales,
        a_recipe,
        b_scales,
        b_recipe,
        output_dtype=out_dtype,
    )


# --------------------------------------------------------------------------------- public


def _check_matrix(x_mk: Tensor) -> None:
    if x_mk.dim() != 2 or (x_mk.stride(1) != 1 and x_mk.size(1) != 1):
        raise LitesparkError(
            f"blockwise quantisation takes a matrix with contiguous rows; got shape "
            f"{tuple(x_mk.shape)} with strides {x_mk.stride()}"
        )


def _check_config(config: LaunchConfig, *, is_cut: bool) -> LaunchConfig:
    strip = config.block_n
    fits = strip == TILE or (is_cut and 0 < strip < TILE and TILE % strip == 0)
    if config.block_m != TILE or not fits:
        part = "or equal parts of it" if is_cut else "and no part of it"
        raise LitesparkError(f"a program takes one {TILE} x {TILE} block {part}; got {config}")
    return config


def quantize_tiles(
    x_mk: Tensor,
    *,
    power_of_two: bool = True,
    rows: bool = True,
    columns: bool = True,
    config: LaunchConfig | None = None,
) -> BlockScaledMatrix:
    """Quantise an activation or gradient with a scale for each 1 x 128 tile.

    Args:
        x_mk: bf16, fp16 or fp32 [m, k], contiguous rows of any stride; any m and k.
        power_of_two: round scales up to powers of two.
        rows: store [m, k], with tiles along k.
        columns: store the transpose [k, m], with tiles along m.
        config: blocks of 128 x 128, or of 128 by a part of it, with any number of warps.

    Raises:
        LitesparkError: rows that are not contiguous, or neither orientation asked for.
    """
    _check_matrix(x_mk)
    if not (rows or columns):
        raise LitesparkError("quantize_tiles: neither rows nor columns asked for")
    if not runs_kernel(x_mk):
        return _matrix_reference(x_mk, 1, power_of_two, rows, columns)
    config = _check_config(config or CANDIDATES["tiles"][0], is_cut=True)
    return _quantize_tiles_on_gpu(x_mk, power_of_two, rows, columns, config)


def quantize_blocks(
    w_nk: Tensor, *, power_of_two: bool = True, config: LaunchConfig | None = None
) -> BlockScaledMatrix:
    """Quantise a weight with a scale for each 128 x 128 block, as it is and transposed.

    Args:
        w_nk: bf16, fp16 or fp32 [n, k], contiguous rows of any stride; any n and k.
        power_of_two: round scales up to powers of two.
        config: blocks of 128 x 128, with any number of warps.

    Raises:
        LitesparkError: rows that are not contiguous.
    """
    _check_matrix(w_nk)
    if not runs_kernel(w_nk):
        return _matrix_reference(w_nk, TILE, power_of_two, rows=True, columns=True)
    config = _check_config(config or CANDIDATES["blocks"][0], is_cut=False)
    return _quantize_blocks_on_gpu(w_nk, power_of_two, config)


def block_scaled_matmul(
    a: BlockScaledOperand,
    b: BlockScaledOperand,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a b^T of two blockwise-scaled matrices a [m, k] and b [n, k]; [m, n] in `out_dtype`.

    A linear layer's three products are x.rows() w.rows(), dy.rows() w.columns() and
    dy.columns() x.columns().  On Hopper with CUDA 12.9 or newer, with m a multiple of 4, n of 16, k
    of 128 and not both sides in 128 x 128 blocks, this is torch's `scaled_mm`; otherwise both are
    dequantised and multiplied in fp32, which is exact but slow.

    Args:
        a: the left side; on the GPU path its scales are as `BlockScaledOperand` lays them out.
        b: the right side, likewise.
        out_dtype: bf16 or fp32.

    Raises:
        LitesparkError: inner dimensions that differ.
    """
    if a.values_mk.size(1) != b.values_mk.size(1):
        raise LitesparkError(
            f"a b^T needs one inner dimension; got a {tuple(a.values_mk.shape)} and "
            f"b {tuple(b.values_mk.shape)}"
        )
    if not _torch_multiplies(a, b):
        return (a.dequantize() @ b.dequantize().t()).to(out_dtype)
    return _torch_product(a, b, out_dtype)
