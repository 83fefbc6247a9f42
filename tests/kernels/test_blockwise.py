"""Blockwise quantisation and products: kernel against reference, reference against the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.blockwise import (
    CANDIDATES,
    BlockScaledMatrix,
    BlockScaledOperand,
    _matrix_reference,
    _torch_multiplies,
    _torch_product,
    block_scaled_matmul,
    quantize_blocks,
    quantize_tiles,
)
from litespark.ops.dispatch import LaunchConfig
from litespark.ops.formats import E4M3
from tests.kernels.test_quantize import same_bits

SHAPES = [(1, 1), (1, 128), (128, 1), (130, 257), (256, 128), (64, 300), (129, 127)]


def spread_out(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Values over many orders of magnitude, so that the tiles' scales differ."""
    return torch.randn(shape, device=device) * torch.randn(shape, device=device).mul(3).exp()


def assert_same(result: BlockScaledMatrix, expected: BlockScaledMatrix) -> None:
    """Bit by bit: scales have no rounding but a division's, and FP8 numbers one of their own."""
    for name in ("rows_mk", "columns_km"):
        actual, reference = getattr(result, name), getattr(expected, name)
        assert (actual is None) == (reference is None)
        if actual is not None:
            assert actual.is_contiguous()
            assert actual.dtype == E4M3
            assert same_bits(actual, reference)
    for name in ("row_scales", "column_scales"):
        actual, reference = getattr(result, name), getattr(expected, name)
        assert (actual is None) == (reference is None)
        if actual is not None:
            assert torch.equal(actual, reference)
            sizes_above_one = [
                (a, b)
                for size, a, b in zip(
                    actual.shape, actual.stride(), reference.stride(), strict=True
                )
                if size > 1
            ]
            assert all(a == b for a, b in sizes_above_one)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles(device, shape, dtype, power_of_two) -> None:
    x_mk = spread_out(shape, device).to(dtype)
    result = quantize_tiles(x_mk, power_of_two=power_of_two)
    assert_same(result, _matrix_reference(x_mk, 1, power_of_two, rows=True, columns=True))


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks(device, shape, dtype, power_of_two) -> None:
    w_nk = spread_out(shape, device).to(dtype)
    result = quantize_blocks(w_nk, power_of_two=power_of_two)
    assert_same(result, _matrix_reference(w_nk, 128, power_of_two, rows=True, columns=True))
    # A block is its own transpose's block.
    assert result.rows_mk is not None
    assert result.columns_km is not None
    assert torch.equal(result.rows_mk.view(torch.uint8), result.columns_km.view(torch.uint8).t())


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_every_candidate_config(device, name) -> None:
    x_mk = spread_out((140, 200), device).bfloat16()
    quantize, tile_rows = (quantize_tiles, 1) if name == "tiles" else (quantize_blocks, 128)
    expected = _matrix_reference(x_mk, tile_rows, True, rows=True, columns=True)
    for config in CANDIDATES[name]:
        assert_same(quantize(x_mk, config=config), expected)
    with pytest.raises(LitesparkError, match="one 128 x 128 block"):
        quantize(x_mk, config=LaunchConfig(64, 128))


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True)])
def test_one_orientation(device, rows, columns) -> None:
    x_mk = spread_out((40, 140), device).bfloat16()
    result = quantize_tiles(x_mk, rows=rows, columns=columns)
    assert_same(result, _matrix_reference(x_mk, 1, True, rows=rows, columns=columns))
    with pytest.raises(LitesparkError, match="without"):
        result.columns() if rows else result.rows()
    with pytest.raises(LitesparkError, match="neither"):
        quantize_tiles(x_mk, rows=False, columns=False)


def test_rows_of_a_wider_matrix(device) -> None:
    wide = spread_out((130, 300), device).bfloat16()
    part = wide[:, 100:270]
    assert_same(quantize_tiles(part), quantize_tiles(part.contiguous()))
    assert_same(quantize_blocks(part), quantize_blocks(part.contiguous()))
    with pytest.raises(LitesparkError, match="contiguous rows"):
        quantize_tiles(wide.t())
    with pytest.raises(LitesparkError, match="contiguous rows"):
        quantize_blocks(wide[None])


@pytest.mark.parametrize("power_of_two", [True, False])
def test_scales_are_those_of_the_definition(device, power_of_two) -> None:
    x_mk = spread_out((3, 300), device)
    x_mk[0, :128] = 0
    x_mk[1, :128] = 448 * 2.0**-5  # exactly representable: the scale is 2^-5
    x_mk[2, :128] = math.nextafter(448.0, 500.0) * 2.0**-5  # in fp32 again 448 * 2^-5
    x_mk[2, 5] = 448.0001 * 2.0**-5  # the next power of two
    scales = quantize_tiles(x_mk, power_of_two=power_of_two, columns=False).row_scales
    assert scales is not None
    assert scales.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            exact = x_mk[i, 128 * j : 128 * (j + 1)].abs().max().item() / 448
            if power_of_two and exact:
                exact = 2.0 ** math.ceil(math.log2(exact))
            assert scales[i, j].item() == pytest.approx(exact or 1.0, rel=1e-7)
    assert scales[:, 0].tolist()[:2] == [1.0, 2.0**-5]
    if power_of_two:
        assert scales[2, 0].item() == 2.0**-4


@pytest.mark.parametrize("power_of_two", [True, False])
def test_error_of_a_value_is_bounded_by_its_tile(device, power_of_two) -> None:
    """An outlier costs its own tile precision, and no other."""
    x_mk = torch.randn(4, 256, device=device)
    x_mk[1, 3] = 1e6
    operand = quantize_tiles(x_mk, power_of_two=power_of_two).rows()
    # Half a step of 2^-3 for normal numbers; of 2^-9 times the scale below 2^-6 times the scale.
    scale = operand.scales.repeat_interleave(128, dim=1)
    bound = torch.maximum(x_mk.abs() * 2**-4, scale * 2**-10) * (1 + 2**-20)
    assert ((operand.dequantize() - x_mk).abs() <= bound).all()
    assert scale[1, 200] < 1 < scale[1, 0]


def test_extreme_and_special_values(device) -> None:
    x_mk = torch.ones(6, 130, device=device)
    x_mk[0, 0] = torch.nan
    x_mk[1, 0] = torch.inf
    x_mk[2, :128] = 1e-42  # subnormal; the scale's reciprocal must stay finite
    x_mk[3, :128] = 3e38
    x_mk[4, :128] = torch.nan
    for power_of_two in (True, False):
        result = quantize_tiles(x_mk, power_of_two=power_of_two, columns=False)
        value = result.rows().dequantize()
        assert value[0, 0].isnan()
        assert torch.equal(value[0, 1:], torch.ones(129, device=device))
        assert value[1, :128].isnan().all()
        assert torch.equal(value[1, 128:], torch.ones(2, device=device))
        assert value[2, :128].abs().max() <= 1e-42
        torch.testing.assert_close(value[3], x_mk[3], rtol=2**-4, atol=0)
        assert value[4, :128].isnan().all()
        assert torch.equal(value[5], x_mk[5]) or not power_of_two
        reference = _matrix_reference(x_mk, 1, power_of_two, rows=True, columns=False)
        torch.testing.assert_close(value, reference.rows().dequantize(), equal_nan=True)
        block = quantize_blocks(x_mk[1:2], power_of_two=power_of_two).rows().dequantize()
        assert block[:, :128].isnan().all()
        assert block[:, 128:].isfinite().all()


def operands(
    kind: str, m: int, n: int, k: int, device: torch.device
) -> tuple[BlockScaledOperand, BlockScaledOperand, Tensor, Tensor]:
    """The sides of one of a linear layer's products, and what they stand for, [m, k] and [n, k]."""
    a_mk, b_nk = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
    if kind == "forward":
        return quantize_tiles(a_mk).rows(), quantize_blocks(b_nk).rows(), a_mk, b_nk
    if kind == "input gradient":
        w_kn = b_nk.t().contiguous()
        return quantize_tiles(a_mk).rows(), quantize_blocks(w_kn).columns(), a_mk, b_nk
    if kind == "weight gradient":
        a_km, b_kn = a_mk.t().contiguous(), b_nk.t().contiguous()
        return quantize_tiles(a_km).columns(), quantize_tiles(b_kn).columns(), a_mk, b_nk
    if kind == "blocks first":
        return quantize_blocks(a_mk).rows(), quantize_tiles(b_nk).rows(), a_mk, b_nk
    return quantize_blocks(a_mk).rows(), quantize_blocks(b_nk).rows(), a_mk, b_nk


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "kind", ["forward", "input gradient", "weight gradient", "blocks first", "blocks twice"]
)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(64, 48, 128), (132, 256, 640), (5, 7, 300), (128, 160, 100), (1, 16, 256), (256, 384, 384)],
)
def test_products(device, kind, m, n, k, out_dtype) -> None:
    a, b, a_mk, b_nk = operands(kind, m, n, k, device)
    result = block_scaled_matmul(a, b, out_dtype=out_dtype)
    assert result.dtype == out_dtype
    assert result.shape == (m, n)
    # In fp64 the product of the dequantised sides is exact.  The tensor cores align the products of
    # a 32-wide step to the largest and keep 14 bits, and what they return is added up in fp32.
    left, right = a.dequantize().double(), b.dequantize().double()
    exact = left @ right.t()
    size = left.abs() @ right.abs().t()
    rounding = 2**-8 if out_dtype == torch.bfloat16 else 2**-22
    assert ((result.double() - exact).abs() <= exact.abs() * rounding + size * 2**-12).all()
    # And the quantisation itself: each side is off by at most 2^-4, on average far less.
    wanted = a_mk.double() @ b_nk.double().t()
    assert (result.double() - wanted).norm() <= 0.05 * wanted.norm()


def test_hopper_takes_torchs_product(device) -> None:
    """Every product of paper-3b's linear layers is one that torch does, where there is a Hopper."""
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
    for kind in ("forward", "input gradient", "weight gradient", "blocks first"):
        a, b, *_ = operands(kind, 128, 256, 384, device)
        assert _torch_multiplies(a, b) == on_hopper
    for kind, m, n, k in [
        ("blocks twice", 128, 128, 128),
        ("forward", 5, 16, 128),
        ("forward", 4, 8, 128),
        ("forward", 4, 16, 144),
    ]:
        a, b, *_ = operands(kind, m, n, k, device)
        assert not _torch_multiplies(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the products themselves are tested")
@pytest.mark.parametrize("kind", ["forward", "input gradient", "weight gradient", "blocks first"])
@pytest.mark.parametrize(("m", "n", "k"), [(128, 256, 384), (256, 128, 128), (128, 128, 1024)])
def test_operands_pass_torchs_checks(device, kind, m, n, k) -> None:
    """Shapes and strides, which torch checks on `meta` tensors too."""
    a, b, *_ = operands(kind, m, n, k, device)
    on_meta = [
        BlockScaledOperand(side.values_mk.to("meta"), side.scales.to("meta"), side.tile_rows)
        for side in (a, b)
    ]
    result = _torch_product(*on_meta, torch.bfloat16)
    assert result.shape == (m, n)
    assert result.dtype == torch.bfloat16


def test_product_of_different_inner_dimensions_is_refused(device) -> None:
    a, _, _, _ = operands("forward", 4, 16, 128, device)
    b, _, _, _ = operands("forward", 4, 16, 256, device)
    with pytest.raises(LitesparkError, match="one inner dimension"):
        block_scaled_matmul(a, b)


def test_the_reference_path() -> None:
    """Outside `kernels_on_cpu`, plain CPU tensors."""
    x_mk = torch.randn(20, 200).bfloat16()
    assert_same(quantize_tiles(x_mk), _matrix_reference(x_mk, 1, True, rows=True, columns=True))
    assert_same(quantize_blocks(x_mk), _matrix_reference(x_mk, 128, True, rows=True, columns=True))
