"""SwiGLU's kernels against the reference, and the reference against autograd in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig
from litespark.ops.formats import E4M3, E5M2, FP8_MAX, Fp8Matrix, QuantizeSpec
from litespark.ops.swiglu import (
    CANDIDATES,
    SwigluLaunch,
    SwigluOutput,
    _backward_reference,
    _forward_reference,
    swiglu,
    swiglu_backward,
)
from tests.kernels.test_quantize import same_bits, spec_for

SMALL = SwigluLaunch(16, 32, group_m=2)
SHAPES = [(1, 1), (1, 40), (37, 1), (64, 64), (33, 17), (70, 100), (2, 333)]
FORMATS = [(E4M3, E5M2), (E5M2, E4M3)]

# The kernels' sigmoid is within 2^-17 of the exact one: exp2 and rsqrt lose 2^-22 each, and the
# rounding of x log2(e), |x| < 40 here, 2^-24 * 58 * ln 2.  Two more roundings to fp32 follow, and
# in backward a sum of two terms, the smaller of which may cancel a part of the other.
FP32: dict[str, Any] = {"rtol": 2**-16, "atol": 2**-16}


def tolerance(dtype: torch.dtype) -> dict[str, Any]:
    """fp32's, and one step where the two fp32 values lie on two sides of a rounding boundary."""
    step = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    return {"rtol": FP32["rtol"] + step, "atol": FP32["atol"]}


def inputs(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """gate_up [m, 2f] and dact [m, f]."""
    m, f = shape
    gate_up_m2f = 2 * torch.randn(m, 2 * f, device=device)
    dact_mf = torch.randn(m, f, device=device)
    return gate_up_m2f.to(dtype), dact_mf.to(dtype)


def in_fp8(values: Tensor, dtype: torch.dtype) -> Fp8Matrix:
    spec = spec_for(dtype, 24.0, values.device)
    limit = FP8_MAX[dtype]
    rows = (values.float() * spec.scale).clamp(-limit, limit).to(dtype)
    return Fp8Matrix(rows, None, spec.scale_inv)


def assert_fp8_close(found: Tensor | None, expected: Tensor | None) -> None:
    """Equal bits but for values on a rounding boundary, which may come out one step apart.

    A boundary falls into an interval of relative width 2^-16 with a probability of 2^-16 divided by
    the least relative distance of two boundaries, 2^-4 for E4M3 (2^-3 for E5M2): 2^-12.  Three
    times that, and three more for the spread of small numbers, are let pass.
    """
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    codes, expected_codes = (x.view(torch.uint8).int() for x in (found, expected))
    # The magnitude's codes are in the order of the numbers; zeros of both signs are one.
    steps = [torch.where(c >= 128, 128 - c, c) for c in (codes, expected_codes)]
    apart = (steps[0] - steps[1]).abs()
    assert apart.max() <= 1
    assert apart.count_nonzero() <= 3 + 3 * found.numel() / 2**12


def columns_match(matrix: Fp8Matrix) -> bool:
    assert matrix.rows_mk is not None
    assert matrix.columns_km is not None
    transposed = matrix.rows_mk.view(torch.uint8).t().contiguous()
    return torch.equal(matrix.columns_km.view(torch.uint8), transposed)


def as_fp8(value: Tensor | Fp8Matrix | None) -> Fp8Matrix:
    assert isinstance(value, Fp8Matrix)
    return value


def as_tensor(value: Tensor | Fp8Matrix | None) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def specs(dtype: torch.dtype, scale: float, device: torch.device) -> tuple[QuantizeSpec, ...]:
    """One for the kernel and one for the reference."""
    return spec_for(dtype, scale, device), spec_for(dtype, scale, device)


def forward_reference(
    gate_up: Tensor | Fp8Matrix,
    quantize: QuantizeSpec | None = None,
    store: QuantizeSpec | None = None,
    dtype: torch.dtype = torch.float32,
) -> SwigluOutput:
    return _forward_reference(gate_up, quantize, quantize is not None, store, None, dtype, None)


def test_reference_is_silu_times_up_and_its_gradient() -> None:
    gate_up, dact = inputs((19, 23), torch.float64, torch.device("cpu"))
    gate_up.requires_grad_()
    gate, up = gate_up.chunk(2, dim=1)
    act = F.silu(gate) * up
    act.backward(dact)
    gate_up32, dact32 = gate_up.detach().float(), dact.float()
    output = forward_reference(gate_up32)
    gradients = _backward_reference(dact32, gate_up32, None, None, True, None)
    # fp32 arithmetic: a handful of roundings of 2^-24 of values below 100.
    close: dict[str, Any] = {"rtol": 2**-20, "atol": 2**-20}
    assert gate_up.grad is not None
    torch.testing.assert_close(as_tensor(output.activation), act.detach().float(), **close)
    torch.testing.assert_close(as_tensor(gradients.dgate_up), gate_up.grad.float(), **close)
    torch.testing.assert_close(as_tensor(gradients.activation), act.detach().float(), **close)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_forward(device, dtype, shape) -> None:
    gate_up, _ = inputs(shape, dtype, device)
    amax, input_amax = (torch.zeros(1, device=device) for _ in range(2))
    output = swiglu(gate_up, amax=amax, input_amax=input_amax, config=SMALL)
    expected = forward_reference(gate_up, dtype=dtype)
    found = as_tensor(output.activation)
    assert output.stored is None
    assert found.dtype == dtype
    torch.testing.assert_close(found, as_tensor(expected.activation), **tolerance(dtype))
    assert torch.equal(amax, found.abs().amax().float().reshape(1))
    assert torch.equal(input_amax, gate_up.abs().amax().float().reshape(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward(device, dtype, shape) -> None:
    gate_up, dact = inputs(shape, dtype, device)
    amax = torch.zeros(1, device=device)
    gradients = swiglu_backward(dact, gate_up, recompute=True, amax=amax, config=SMALL)
    expected = _backward_reference(dact, gate_up, None, None, True, None)
    found = as_tensor(gradients.dgate_up)
    assert found.dtype == dtype
    torch.testing.assert_close(found, as_tensor(expected.dgate_up), **tolerance(dtype))
    activation = as_tensor(gradients.activation)
    torch.testing.assert_close(activation, as_tensor(expected.activation), **tolerance(dtype))
    assert torch.equal(amax, found.abs().amax().float().reshape(1))
    assert swiglu_backward(dact, gate_up, config=SMALL).activation is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fp8", "store_fp8"), FORMATS)
def test_forward_to_fp8(device, fp8, store_fp8, shape) -> None:
    gate_up, _ = inputs(shape, torch.bfloat16, device)
    spec, expected_spec = specs(fp8, 30.0, device)
    store, expected_store = specs(store_fp8, 20.0, device)
    output = swiglu(gate_up, quantize=spec, columns=True, store=store, config=SMALL)
    expected = forward_reference(gate_up, expected_spec, store=expected_store)
    activation = as_fp8(output.activation)
    assert_fp8_close(activation.rows_mk, as_fp8(expected.activation).rows_mk)
    assert columns_match(activation)
    assert activation.scale_inv is spec.scale_inv
    torch.testing.assert_close(spec.amax, expected_spec.amax, **FP32)
    # No sigmoid here: one multiplication and one rounding.
    stored = as_fp8(output.stored)
    assert same_bits(stored.rows_mk, as_fp8(expected.stored).rows_mk)
    assert stored.columns_km is None
    assert stored.scale_inv is store.scale_inv
    assert torch.equal(store.amax, gate_up.abs().amax().float().reshape(1))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_forward_from_fp8(device, fp8, out_dtype) -> None:
    gate_up, _ = inputs((45, 50), torch.float32, device)
    matrix = in_fp8(gate_up, fp8)
    input_amax = torch.zeros(1, device=device)
    output = swiglu(matrix, out_dtype=out_dtype, input_amax=input_amax, config=SMALL)
    expected = forward_reference(matrix, dtype=out_dtype)
    found = as_tensor(output.activation)
    assert found.dtype == out_dtype
    torch.testing.assert_close(found, as_tensor(expected.activation), **tolerance(out_dtype))
    assert torch.equal(input_amax, matrix.dequantize().abs().amax().reshape(1))

    spec, expected_spec = specs(E4M3, 30.0, device)
    found = as_fp8(swiglu(matrix, quantize=spec, config=SMALL).activation)
    expected = forward_reference(matrix, expected_spec)
    assert_fp8_close(found.rows_mk, as_fp8(expected.activation).rows_mk)
    assert found.columns_km is None


@pytest.mark.parametrize("stored", [E4M3, E5M2, None])
@pytest.mark.parametrize(("act_fp8", "fp8"), FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (37, 1), (64, 64), (70, 100)])
def test_backward_to_fp8(device, act_fp8, fp8, stored, shape) -> None:
    gate_up, dact = inputs(shape, torch.bfloat16, device)
    kept = gate_up if stored is None else in_fp8(gate_up, stored)
    spec, expected_spec = specs(fp8, 30.0, device)
    act_spec, expected_act_spec = specs(act_fp8, 12.0, device)
    act_spec.amax.fill_(1e-3)
    gradients = swiglu_backward(dact, kept, quantize=spec, activation_spec=act_spec, config=SMALL)
    expected = _backward_reference(dact, kept, expected_spec, expected_act_spec, False, None)
    dgate_up, activation = as_fp8(gradients.dgate_up), as_fp8(gradients.activation)
    assert_fp8_close(dgate_up.rows_mk, as_fp8(expected.dgate_up).rows_mk)
    assert columns_match(dgate_up)
    torch.testing.assert_close(spec.amax, expected_spec.amax, **FP32)
    assert_fp8_close(activation.columns_km, as_fp8(expected.activation).columns_km)
    assert activation.rows_mk is None
    assert act_spec.amax.item() == pytest.approx(1e-3)
    assert expected_act_spec.amax.item() == 0


def test_backward_to_fp8_with_activation_in_bf16(device) -> None:
    gate_up, dact = inputs((40, 48), torch.bfloat16, device)
    spec, expected_spec = specs(E5M2, 30.0, device)
    gradients = swiglu_backward(dact, gate_up, quantize=spec, recompute=True, config=SMALL)
    expected = _backward_reference(dact, gate_up, expected_spec, None, True, None)
    assert_fp8_close(as_fp8(gradients.dgate_up).rows_mk, as_fp8(expected.dgate_up).rows_mk)
    assert columns_match(as_fp8(gradients.dgate_up))
    found, activation = as_tensor(gradients.activation), as_tensor(expected.activation)
    torch.testing.assert_close(found, activation, **tolerance(torch.bfloat16))


def test_activation_is_the_same_in_backward(device) -> None:
    """FC2's weight gradient must see what its product saw; both compute it from one matrix."""
    gate_up, dact = inputs((50, 70), torch.bfloat16, device)
    matrix = in_fp8(gate_up, E4M3)
    spec, _ = specs(E4M3, 30.0, device)
    output = swiglu(matrix, quantize=spec, columns=True, config=SMALL)
    gradients = swiglu_backward(dact, matrix, activation_spec=spec, config=SMALL)
    assert same_bits(as_fp8(gradients.activation).columns_km, as_fp8(output.activation).columns_km)
    assert as_tensor(gradients.dgate_up).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config", [*CANDIDATES["forward"], *CANDIDATES["forward_columns"], LaunchConfig(32, 16)]
)
def test_every_forward_config(device, config) -> None:
    """Sides divisible by 16, as in training, which on a GPU is code of its own; partial tiles."""
    gate_up, _ = inputs((144, 160), torch.bfloat16, device)
    (spec, expected_spec), (store, expected_store) = (specs(E4M3, 30.0, device) for _ in range(2))
    output = swiglu(gate_up, quantize=spec, columns=True, store=store, config=config)
    expected = forward_reference(gate_up, expected_spec, store=expected_store)
    assert_fp8_close(as_fp8(output.activation).rows_mk, as_fp8(expected.activation).rows_mk)
    assert columns_match(as_fp8(output.activation))
    assert same_bits(as_fp8(output.stored).rows_mk, as_fp8(expected.stored).rows_mk)


@pytest.mark.parametrize(
    "config", [*CANDIDATES["backward"], *CANDIDATES["backward_columns"], LaunchConfig(32, 16)]
)
def test_every_backward_config(device, config) -> None:
    gate_up, dact = inputs((144, 160), torch.bfloat16, device)
    matrix = in_fp8(gate_up, E4M3)
    spec, expected_spec = specs(E5M2, 30.0, device)
    act_spec, expected_act_spec = specs(E4M3, 30.0, device)
    gradients = swiglu_backward(
        dact, matrix, quantize=spec, activation_spec=act_spec, config=config
    )
    expected = _backward_reference(dact, matrix, expected_spec, expected_act_spec, False, None)
    assert_fp8_close(as_fp8(gradients.dgate_up).rows_mk, as_fp8(expected.dgate_up).rows_mk)
    assert columns_match(as_fp8(gradients.dgate_up))
    assert_fp8_close(
        as_fp8(gradients.activation).columns_km, as_fp8(expected.activation).columns_km
    )


@pytest.mark.parametrize("group_m", [1, 2, 3, 4, 5, 100])
def test_programs_cover_every_tile(device, group_m) -> None:
    """4 by 3 tiles; what no program writes is NaN."""
    gate_up, dact = inputs((60, 40), torch.float32, device)
    config = SwigluLaunch(16, 16, group_m=group_m)
    found = as_tensor(swiglu(gate_up, config=config).activation)
    expected = forward_reference(gate_up)
    torch.testing.assert_close(found, as_tensor(expected.activation), **FP32)
    found = as_tensor(swiglu_backward(dact, gate_up, config=config).dgate_up)
    expected = _backward_reference(dact, gate_up, None, None, False, None)
    torch.testing.assert_close(found, as_tensor(expected.dgate_up), **FP32)


def test_default_configs(device) -> None:
    gate_up, dact = inputs((3, 20), torch.float32, device)
    spec, _ = specs(E4M3, 30.0, device)
    plain = as_tensor(swiglu(gate_up).activation)
    quantized = as_fp8(swiglu(gate_up, quantize=spec, columns=True).activation)
    # E4M3 rounds to 4 significant bits, and below 2^-6 to multiples of 2^-9.
    torch.testing.assert_close(quantized.dequantize(), plain, rtol=0.0626, atol=2**-10 / 30)
    dgate_up = as_tensor(swiglu_backward(dact, gate_up).dgate_up)
    quantized = as_fp8(swiglu_backward(dact, gate_up, quantize=spec).dgate_up)
    torch.testing.assert_close(quantized.dequantize(), dgate_up, rtol=0.0626, atol=2**-10 / 30)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_saturation_nan_and_infinity(device, fp8) -> None:
    gate_up = torch.ones(4, 20, device=device)  # g beside u, 10 columns each
    gate_up[0, 0] = 1e7
    gate_up[1, 1] = -1e7  # silu is zero
    gate_up[2, 12] = -1e7
    gate_up[3, 3] = torch.nan
    gate_up[3, 14] = torch.nan
    gate_up[0, 15] = torch.inf
    dact = torch.ones(4, 10, device=device)
    spec, expected_spec = specs(fp8, 1.0, device)
    store, _ = specs(fp8, 1.0, device)
    act_spec, _ = specs(fp8, 1.0, device)
    output = swiglu(gate_up, quantize=spec, columns=True, store=store, config=SMALL)
    values = as_fp8(output.activation).dequantize()
    expected = as_fp8(forward_reference(gate_up, expected_spec).activation).dequantize()
    torch.testing.assert_close(values, expected, equal_nan=True)
    limit = FP8_MAX[fp8]
    assert values[0, 0].item() == values[0, 5].item() == limit
    assert values[1, 1].item() == 0
    assert values[2, 2].item() == -limit
    assert values.isnan().nonzero().tolist() == [[3, 3], [3, 4]]
    assert columns_match(as_fp8(output.activation))
    stored = as_fp8(output.stored).dequantize()
    torch.testing.assert_close(stored, gate_up.clamp(-limit, limit), equal_nan=True)

    gradients = swiglu_backward(
        dact, gate_up, quantize=spec, activation_spec=act_spec, config=SMALL
    )
    expected = _backward_reference(dact, gate_up, expected_spec, act_spec, False, None)
    values = as_fp8(gradients.dgate_up).dequantize()
    assert values.isnan().sum() == 3  # dg and du for a NaN in g, dg for one in u
    torch.testing.assert_close(values, as_fp8(expected.dgate_up).dequantize(), equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, in the interpreter
def test_large_gates(device) -> None:
    """exp(-g) overflows below -88 and vanishes above 88; neither may turn into NaN."""
    gate = torch.tensor([-1e30, -200.0, -90.0, -88.0, -60.0, 0.0, 60.0, 88.0, 90.0, 1e30])
    gate_up = torch.stack([gate, torch.full_like(gate, 2.0)]).reshape(1, -1).to(device)
    dact = torch.ones(1, 10, device=device)
    found = as_tensor(swiglu(gate_up, config=SMALL).activation)
    expected = forward_reference(gate_up)
    torch.testing.assert_close(found, as_tensor(expected.activation), **FP32)
    found = as_tensor(swiglu_backward(dact, gate_up, config=SMALL).dgate_up)
    expected = _backward_reference(dact, gate_up, None, None, False, None)
    torch.testing.assert_close(found, as_tensor(expected.dgate_up), **FP32)


def test_amax_is_raised_never_lowered(device) -> None:
    gate_up = torch.full((40, 80), 2.0, device=device)
    dact = torch.ones(40, 40, device=device)
    for start, raised in ((100.0, False), (0.5, True)):
        amax, input_amax, damax = (torch.full((1,), start, device=device) for _ in range(3))
        spec = spec_for(E4M3, 1.0, device)
        spec.amax.fill_(start)
        swiglu(gate_up, amax=amax, input_amax=input_amax, config=SMALL)
        swiglu(gate_up, quantize=spec, config=SMALL)
        swiglu_backward(dact, gate_up, amax=damax, config=SMALL)
        for value in (amax, input_amax, damax, spec.amax):
            assert (value.item() > start) == raised


def test_without_kernels_the_reference_runs() -> None:
    gate_up, dact = inputs((5, 6), torch.bfloat16, torch.device("cpu"))
    spec, expected_spec = specs(E4M3, 30.0, gate_up.device)
    found = as_fp8(swiglu(gate_up, quantize=spec, columns=True).activation)
    expected = forward_reference(gate_up, expected_spec)
    assert same_bits(found.rows_mk, as_fp8(expected.activation).rows_mk)
    assert columns_match(found)
    gradients = swiglu_backward(dact, gate_up, recompute=True)
    expected = _backward_reference(dact, gate_up, None, None, True, None)
    assert torch.equal(as_tensor(gradients.dgate_up), as_tensor(expected.dgate_up))


def test_what_is_refused(device) -> None:
    gate_up, dact = inputs((6, 8), torch.float32, device)
    spec = spec_for(E4M3, 1.0, device)
    amax = torch.zeros(1, device=device)
    for wrong in (gate_up.t(), gate_up[:, ::2], gate_up[0], gate_up[:, :5].contiguous()):
        with pytest.raises(LitesparkError, match="gate_up must be a contiguous matrix"):
            swiglu(wrong)
    for wrong in (dact[:5], dact[:, :7].contiguous(), dact.t().contiguous().t()):
        with pytest.raises(LitesparkError, match="dact must be a contiguous matrix"):
            swiglu_backward(wrong, gate_up)
    columns = Fp8Matrix(None, gate_up.to(E4M3), spec.scale_inv)
    with pytest.raises(LitesparkError, match="columns only"):
        swiglu(columns)
    with pytest.raises(LitesparkError, match="columns only"):
        swiglu_backward(dact, columns)
    with pytest.raises(LitesparkError, match="give `quantize`"):
        swiglu(gate_up, columns=True)
    with pytest.raises(LitesparkError, match="give no other"):
        swiglu(gate_up, quantize=spec, amax=amax)
    with pytest.raises(LitesparkError, match="give no other"):
        swiglu_backward(dact, gate_up, quantize=spec, amax=amax)
    with pytest.raises(LitesparkError, match="exclude one another"):
        swiglu_backward(dact, gate_up, recompute=True, activation_spec=spec)
