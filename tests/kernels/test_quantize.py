"""Quantisation and transposition against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig
from litespark.ops.formats import E4M3, E5M2, FP8_MAX, QuantizeSpec
from litespark.ops.quantize import (
    CANDIDATES,
    _current_scale_reference,
    _quantize_reference,
    current_scale,
    quantize,
    raise_amax,
    transpose,
)

SMALL = LaunchConfig(32, 16)


def spec_for(dtype: torch.dtype, scale: float, device: torch.device) -> QuantizeSpec:
    scale_1 = torch.tensor([scale], device=device)
    return QuantizeSpec(dtype, scale_1, 1 / scale_1, torch.zeros(1, device=device))


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    assert one is not None
    assert other is not None
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 48), (37, 1), (64, 64), (33, 17), (70, 130), (2, 333)]
)
def test_both_orientations_and_amax(device, fp8, dtype, shape) -> None:
    x_mk = torch.randn(shape, device=device).to(dtype)
    spec, expected_spec = (spec_for(fp8, 60.0, device) for _ in range(2))

    result = quantize(x_mk, spec, config=SMALL)
    expected = _quantize_reference(x_mk, expected_spec, rows=True, columns=True)

    # Both multiply in fp32 and round once, to nearest even: not one bit may differ.
    assert same_bits(result.rows_mk, expected.rows_mk)
    assert same_bits(result.columns_km, expected.columns_km)
    assert result.rows_mk.dtype == result.columns_km.dtype == fp8
    assert torch.equal(spec.amax, x_mk.abs().amax().float().reshape(1))
    # Half a step: 3 mantissa bits lose at most 2^-4 of a value, 2 bits 2^-3; below the smallest
    # normal number the steps are 2^-9 and 2^-16.
    relative, absolute = (2**-4, 2**-10) if fp8 == E4M3 else (2**-3, 2**-17)
    torch.testing.assert_close(
        result.dequantize(), x_mk.float(), rtol=1.001 * relative, atol=1.001 * absolute / 60
    )


@pytest.mark.parametrize("config", CANDIDATES["quantize"])
def test_every_candidate_config(device, config) -> None:
    x_mk = torch.randn(130, 129, device=device).bfloat16()
    spec, expected_spec = (spec_for(E4M3, 30.0, device) for _ in range(2))
    result = quantize(x_mk, spec, config=config)
    expected = _quantize_reference(x_mk, expected_spec, rows=True, columns=True)
    assert same_bits(result.rows_mk, expected.rows_mk)
    assert same_bits(result.columns_km, expected.columns_km)


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True)])
def test_one_orientation(device, rows, columns) -> None:
    x_mk = torch.randn(20, 50, device=device).bfloat16()
    spec, expected_spec = (spec_for(E4M3, 30.0, device) for _ in range(2))
    result = quantize(x_mk, spec, rows=rows, columns=columns, config=SMALL)
    expected = _quantize_reference(x_mk, expected_spec, rows=True, columns=True)
    assert (result.rows_mk is not None, result.columns_km is not None) == (rows, columns)
    if result.rows_mk is not None:
        assert same_bits(result.rows_mk, expected.rows_mk)
    if result.columns_km is not None:
        assert same_bits(result.columns_km, expected.columns_km)
    with pytest.raises(LitesparkError, match="neither"):
        quantize(x_mk, spec, rows=False, columns=False)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_every_bf16_number(device, fp8) -> None:
    """Rounding, ties, subnormal numbers, saturation, NaN and infinities."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x_mk = bits.view(torch.bfloat16).reshape(256, 256).to(device)
    spec, expected_spec = (spec_for(fp8, 1.0, device) for _ in range(2))
    stored = quantize(x_mk, spec, config=LaunchConfig(128, 128, 8)).rows_mk
    expected = _quantize_reference(x_mk, expected_spec, rows=True, columns=False).rows_mk
    assert stored is not None
    assert expected is not None
    value, expected_value = stored.float(), expected.float()
    nan = x_mk.isnan()
    assert torch.equal(value.isnan(), nan)
    assert torch.equal(value[~nan], expected_value[~nan])
    limit = FP8_MAX[fp8]
    assert value[~nan].abs().max() == limit
    assert (value[~nan & (x_mk.abs() > limit)].abs() == limit).all()


def test_infinity_saturates_and_shows_in_amax(device) -> None:
    x_mk = torch.ones(3, 5, device=device)
    x_mk[1, 2] = -torch.inf
    spec = spec_for(E4M3, 1.0, device)
    result = quantize(x_mk, spec, config=SMALL)
    assert result.rows_mk is not None
    assert result.rows_mk[1, 2].float() == -448
    assert spec.amax.item() == torch.inf


def test_amax_is_raised_never_lowered(device) -> None:
    x_mk = torch.full((40, 40), -3.0, device=device)
    spec = spec_for(E4M3, 1.0, device)
    spec.amax.fill_(5.0)
    quantize(x_mk, spec, config=SMALL)
    raise_amax(x_mk, spec.amax)
    assert spec.amax.item() == 5.0
    x_mk[39, 39] = -7.0
    raise_amax(x_mk, spec.amax)
    assert spec.amax.item() == 7.0


def views(device: torch.device) -> dict[str, Tensor]:
    """Tensors whose rows are contiguous in every memory order that the blocks produce."""

    def filled(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    return {
        "wide rows": filled(21, 64)[:, 8:40],
        "one row of a matrix": filled(4, 24)[1:2],
        "sbk": filled(9, 3, 20),
        "sbk from bsk": filled(3, 9, 20).transpose(0, 1),
        "sbk part": filled(9, 3, 40)[:, :, 20:],
        "sbnd": filled(9, 3, 4, 6),
        "sbnd from bsnd": filled(3, 9, 4, 6).transpose(0, 1),
        "b = 1": filled(1, 9, 4, 6).transpose(0, 1),
        "s = 1": filled(3, 1, 4, 6).transpose(0, 1),
        "n = 1": filled(3, 9, 1, 6).transpose(0, 1),
        "d = 1": filled(3, 9, 5, 1).transpose(0, 1),
    }


@pytest.mark.parametrize("name", list(views(torch.device("cpu"))))
def test_views_are_read_without_a_copy(device, name) -> None:
    x = views(device)[name]
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    spec, expected_spec = (spec_for(E4M3, 50.0, device) for _ in range(2))
    result = quantize(x, spec, config=SMALL)
    flat_mk = x.contiguous().reshape(rows, -1)
    expected = _quantize_reference(flat_mk, expected_spec, rows=True, columns=True)
    assert same_bits(result.rows_mk, expected.rows_mk)
    assert same_bits(result.columns_km, expected.columns_km)
    amax = torch.zeros(1, device=device)
    raise_amax(x, amax, config=SMALL)
    assert torch.equal(amax, flat_mk.abs().amax().float().reshape(1))
    assert torch.equal(spec.amax, amax)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 6).t(),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(2, 3, 4, 6).transpose(2, 3),
        torch.zeros(2, 3, 4, 6)[..., :3],
        torch.zeros(5),
    ],
)
def test_rows_that_are_not_contiguous_are_refused(device, x) -> None:
    x = torch.empty_strided(x.shape, x.stride(), device=device)
    with pytest.raises(LitesparkError, match="rows of a tensor"):
        quantize(x, spec_for(E4M3, 1.0, device))
    with pytest.raises(LitesparkError, match="rows of a tensor"):
        raise_amax(x, torch.zeros(1, device=device))


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (130, 1), (64, 256), (65, 257)])
def test_transpose(device, fp8, shape) -> None:
    bits = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    rows_mk = bits.view(fp8)
    columns_km = transpose(rows_mk)
    assert columns_km.dtype == fp8
    assert columns_km.is_contiguous()
    assert torch.equal(columns_km.view(torch.uint8), bits.t())


def test_transpose_takes_contiguous_fp8(device) -> None:
    with pytest.raises(LitesparkError, match="contiguous FP8"):
        transpose(torch.zeros(2, 2, device=device))
    with pytest.raises(LitesparkError, match="contiguous FP8"):
        transpose(torch.zeros(2, 3, device=device).to(E4M3).t())


@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (100, 7), (33, 530)])
def test_raise_amax(device, shape) -> None:
    x_mk = torch.randn(shape, device=device).bfloat16()
    amax = torch.zeros(1, device=device)
    raise_amax(x_mk, amax)
    assert torch.equal(amax, x_mk.abs().amax().float().reshape(1))


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize(
    "amax", [0.0, 1.0, 3.7, 1e-37, 1e-45, 3.4e38, torch.inf, torch.nan, FP8_MAX[E4M3]]
)
def test_current_scale(device, fp8, amax) -> None:
    amax_1 = torch.tensor([amax], device=device)
    scale, scale_inv = current_scale(amax_1, fp8)
    expected, expected_inv = _current_scale_reference(amax_1, FP8_MAX[fp8])
    assert scale.shape == scale_inv.shape == (1,)
    # One division each, rounded to nearest.
    assert torch.equal(scale, expected)
    assert torch.equal(scale_inv, expected_inv)
    assert scale.isfinite().all()
    assert scale_inv.item() >= torch.finfo(torch.float32).tiny
    if amax == 0 or amax != amax or amax == torch.inf:
        assert scale.item() == scale_inv.item() == 1
    elif amax > 1e-30:
        assert scale.item() == pytest.approx(FP8_MAX[fp8] / amax, rel=1e-6)
