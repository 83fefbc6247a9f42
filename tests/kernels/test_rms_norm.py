"""Residual sum and RMSNorm against plain torch, and that against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig
from litespark.ops.formats import E4M3, E5M2, FP8_MAX, Fp8Matrix, QuantizeSpec
from litespark.ops.rms_norm import (
    CANDIDATES,
    _backward_reference,
    _forward_reference,
    add_rms_norm,
    recompute_normed,
    rms_norm_backward,
)

# The interpreter must round as the GPU does.

# Sums of at most 2^9 numbers, of which a chain of 2^4 follows a tree, and a handful of products:
# fewer than 2^5 roundings of 2^-24 each on a path.  Triton's division and rsqrt are within 2^-22.
FP32 = 2**-18
EPS = 1e-2  # large enough that leaving it out shows

WHOLE = LaunchConfig(2, 512, num_stages=1)
WALK = LaunchConfig(16, 32, num_stages=2)
WIDE = LaunchConfig(64, 16, num_stages=1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN, 1 / 0
SHAPES = [(1, 1), (1, 48), (33, 17), (19, 300)]


def filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def spec_for(dtype: torch.dtype, scale: float, device: torch.device) -> QuantizeSpec:
    scale_1 = torch.tensor([scale], device=device)
    return QuantizeSpec(dtype, scale_1, 1 / scale_1, torch.zeros(1, device=device))


def ordinals(values: Tensor) -> Tensor:
    """Numbers of 8 or 16 bits counted from zero in steps of their format."""
    size = 8 * values.element_size()
    bits = values.view(torch.uint8 if size == 8 else torch.int16).int() & (2**size - 1)
    magnitude = bits & (2 ** (size - 1) - 1)
    return torch.where(bits >= 2 ** (size - 1), -magnitude, magnitude)


def assert_alike(actual: Tensor, expected: Tensor) -> None:
    """Equal but for fp32 errors; rounded, one step where the fp32 value is at a boundary.

    A boundary is met by a share of FP32 / 2^-8 = 2^-10 of the bf16 numbers, and fewer in FP8.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=FP32, atol=0)
        return
    steps = (ordinals(actual) - ordinals(expected)).abs()
    assert steps.max() <= 1
    assert (steps > 0).sum() <= 2 + actual.numel() / 200


def assert_fp8_alike(actual: Tensor | Fp8Matrix | None, expected: Fp8Matrix) -> None:
    assert isinstance(actual, Fp8Matrix)
    assert actual.rows_mk is not None
    assert expected.rows_mk is not None
    assert actual.rows_mk.is_contiguous()
    assert_alike(actual.rows_mk, expected.rows_mk)
    assert (actual.columns_km is None) == (expected.columns_km is None)
    if actual.columns_km is not None:
        assert actual.columns_km.is_contiguous()
        assert torch.equal(
            actual.columns_km.view(torch.uint8), actual.rows_mk.view(torch.uint8).t()
        )
    assert actual.scale_inv is expected.scale_inv


def assert_gradient_alike(actual: Tensor, expected: Tensor, term: float) -> None:
    """Equal but for fp32 errors of the terms that it is the difference of; in bf16, neighbours."""
    assert actual.dtype == expected.dtype
    rounding = 0.0 if actual.dtype == torch.float32 else 2**-7
    size = max(term, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=FP32 * size)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (20, 64)])
def test_reference_against_autograd(residual, shape) -> None:
    """The public functions on a CPU, where they are the reference."""
    cpu = torch.device("cpu")
    x, res, dnormed, dres = (filled(shape, torch.float64, cpu) for _ in range(4))
    weight = filled(shape[1:], torch.float64, cpu)
    leaves = [x, weight] + ([res] if residual else [])
    for leaf in leaves:
        leaf.requires_grad_()
    summed = x + res if residual else x * 1
    normed = F.rms_norm(summed, shape[1:], weight, EPS)
    torch.autograd.backward([normed, summed], [dnormed, dres])

    def single(tensor: Tensor) -> Tensor:
        return tensor.detach().float()

    output = add_rms_norm(single(x), single(res) if residual else None, single(weight), EPS)
    found = rms_norm_backward(
        single(dnormed), output.summed_mh, single(weight), output.rstd_m, dsummed_mh=single(dres)
    )
    assert isinstance(output.normed, Tensor)
    pairs = [
        (output.summed_mh, summed),
        (output.normed, normed),
        (output.rstd_m, (summed.square().mean(-1) + EPS).rsqrt()),
        (found.dsummed_mh, x.grad),
        (found.dweight_h, weight.grad),
        (recompute_normed(output.summed_mh, single(weight), output.rstd_m), normed),
    ]
    if residual:
        pairs.append((found.dsummed_mh, res.grad))
    for actual, expected in pairs:
        assert expected is not None
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_reference_quantises_what_it_computed() -> None:
    cpu = torch.device("cpu")
    x, weight = (filled(s, torch.float32, cpu) for s in ((6, 20), (20,)))
    spec = spec_for(E4M3, 50.0, cpu)
    values = add_rms_norm(x, None, weight, EPS).normed
    matrix = add_rms_norm(x, None, weight, EPS, quantize=spec).normed
    assert isinstance(matrix, Fp8Matrix)
    assert isinstance(values, Tensor)
    rows_mk = (values * spec.scale).to(spec.dtype)
    assert_fp8_alike(matrix, Fp8Matrix(rows_mk, rows_mk.t(), spec.scale_inv))
    assert torch.equal(spec.amax, values.abs().max().reshape(1))


def check_forward(device, shape, dtype, residual, config) -> None:
    x_mh = filled(shape, dtype, device)
    residual_mh = filled(shape, dtype, device) if residual else None
    weight_h = filled(shape[1:], dtype, device)
    amax = torch.zeros(1, device=device)

    output = add_rms_norm(x_mh, residual_mh, weight_h, EPS, amax=amax, config=config)
    expected = _forward_reference(x_mh, residual_mh, weight_h, EPS, None, True, None)

    assert torch.equal(output.summed_mh, expected.summed_mh)
    assert (output.summed_mh is x_mh) == (residual_mh is None)
    assert_alike(output.rstd_m, expected.rstd_m)
    assert isinstance(output.normed, Tensor)
    assert isinstance(expected.normed, Tensor)
    assert_alike(output.normed, expected.normed)
    assert torch.equal(amax, output.normed.abs().max().float().reshape(1))  # as it is stored
    assert torch.equal(recompute_normed(output.summed_mh, weight_h, output.rstd_m), output.normed)


def check_forward_fp8(device, shape, fp8, columns, config) -> None:
    x_mh, residual_mh = (filled(shape, torch.bfloat16, device) for _ in range(2))
    weight_h = filled(shape[1:], torch.float32, device)
    spec = spec_for(fp8, 60.0, device)
    expected_spec = QuantizeSpec(fp8, spec.scale, spec.scale_inv, torch.zeros(1, device=device))

    output = add_rms_norm(
        x_mh, residual_mh, weight_h, EPS, quantize=spec, columns=columns, config=config
    )
    expected = _forward_reference(x_mh, residual_mh, weight_h, EPS, expected_spec, columns, None)

    assert torch.equal(output.summed_mh, expected.summed_mh)
    assert_alike(output.rstd_m, expected.rstd_m)
    assert isinstance(expected.normed, Fp8Matrix)
    assert_fp8_alike(output.normed, expected.normed)
    torch.testing.assert_close(spec.amax, expected_spec.amax, rtol=FP32, atol=0)


@pytest.mark.parametrize("config", [WHOLE, WALK, None])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(device, shape, dtype, residual, config) -> None:
    check_forward(device, shape, dtype, residual, config)


@pytest.mark.parametrize("config", [WHOLE, WALK, WIDE, None])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(1, 1), (35, 17), (19, 300)])
def test_forward_fp8(device, shape, fp8, columns, config) -> None:
    check_forward_fp8(device, shape, fp8, columns, config)


def test_sum_is_rounded_before_it_is_normalised(device) -> None:
    """In bf16, 256 + 1 = 256: all numbers are alike, and their normed is exactly 1."""
    x_mh = torch.full((3, 64), 256.0, device=device).bfloat16()
    residual_mh = torch.zeros(3, 64, device=device).bfloat16()
    residual_mh[:, ::2] = 1
    weight_h = torch.ones(64, device=device)
    spec = spec_for(E4M3, 1.0, device)
    for config in (WHOLE, WALK):
        output = add_rms_norm(x_mh, residual_mh, weight_h, 0.0, quantize=spec, config=config)
        torch.testing.assert_close(
            output.rstd_m, torch.full((3,), 1 / 256, device=device), rtol=FP32, atol=0
        )
    torch.testing.assert_close(spec.amax, torch.ones(1, device=device), rtol=FP32, atol=0)


@pytest.mark.parametrize("config", [WHOLE, WALK])
@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_saturation(device, fp8, config) -> None:
    x_mh = filled((20, 50), torch.bfloat16, device)
    weight_h = torch.ones(50, device=device)
    spec = spec_for(fp8, FP8_MAX[fp8], device)
    matrix = add_rms_norm(x_mh, None, weight_h, EPS, quantize=spec, config=config).normed
    assert isinstance(matrix, Fp8Matrix)
    for stored in (matrix.rows_mk, matrix.columns_km):
        assert stored is not None
        assert stored.float().isfinite().all()
        assert stored.float().abs().max() == FP8_MAX[fp8]
    assert spec.amax * spec.scale > FP8_MAX[fp8]


@pytest.mark.parametrize("config", [WHOLE, WALK])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_with_bad_numbers(device, bad, config) -> None:
    """NaN fills its row; infinity makes itself NaN and the rest of its row 0; no other row."""
    x_mh, dnormed_mh = (filled((20, 50), torch.bfloat16, device) for _ in range(2))
    weight_h = filled((50,), torch.bfloat16, device)
    x_mh[3, 4] = bad
    spec = spec_for(E4M3, 60.0, device)
    expected = _forward_reference(x_mh, None, weight_h, EPS, None, True, None)
    inputs = (dnormed_mh, x_mh, weight_h, expected.rstd_m)
    output = add_rms_norm(x_mh, None, weight_h, EPS, quantize=spec, config=config)
    plain = rms_norm_backward(*inputs, config=config)
    bad_row = torch.arange(20, device=device)[:, None] == 3
    assert isinstance(expected.normed, Tensor)
    assert torch.equal(plain.dsummed_mh.isnan(), bad_row.expand(20, 50))
    assert plain.dweight_h[4].isnan()
    matrix, nan_mh = output.normed, expected.normed.isnan()
    assert isinstance(matrix, Fp8Matrix)
    assert matrix.rows_mk is not None
    assert matrix.columns_km is not None
    assert nan_mh[3].any()
    assert torch.equal(matrix.rows_mk.float().isnan(), nan_mh)
    assert torch.equal(matrix.columns_km.float().isnan(), nan_mh.t())


@pytest.mark.parametrize("config", [WHOLE, WALK])
def test_amax_is_raised_never_lowered(device, config) -> None:
    x_mh = filled((40, 40), torch.bfloat16, device)
    weight_h = torch.ones(40, device=device)
    amax = torch.full((1,), 100.0, device=device)
    spec = spec_for(E4M3, 1.0, device)
    spec.amax.fill_(100.0)
    add_rms_norm(x_mh, None, weight_h, EPS, amax=amax, config=config)
    add_rms_norm(x_mh, None, weight_h, EPS, quantize=spec, config=config)
    assert amax.item() == spec.amax.item() == 100
    weight_h[17] = -1e4
    add_rms_norm(x_mh, None, weight_h, EPS, amax=amax, config=config)
    add_rms_norm(x_mh, None, weight_h, EPS, quantize=spec, config=config)
    assert amax.item() > 1000
    assert spec.amax.item() == pytest.approx(amax.item(), rel=2**-8)


@pytest.mark.parametrize("config", [LaunchConfig(16, 512), WALK])
def test_no_eps_and_rows_that_do_not_exist(device, config) -> None:
    amax = torch.zeros(1, device=device)
    x_mh = filled((3, 33), torch.float32, device)
    output = add_rms_norm(x_mh, None, torch.ones(33, device=device), 0, amax=amax, config=config)
    assert isinstance(output.normed, Tensor)
    assert amax.item() == output.normed.abs().max().item()


def check_backward(device, shape, dtype, residual, config) -> None:
    dnormed_mh, summed_mh, dres_mh = (filled(shape, dtype, device) for _ in range(3))
    weight_h = filled(shape[1:], dtype, device)
    rstd_m = torch.rsqrt(summed_mh.float().square().mean(-1) + EPS)
    inputs = (dnormed_mh, summed_mh, weight_h, rstd_m)
    dsummed_mh = dres_mh if residual else None

    found = rms_norm_backward(*inputs, dsummed_mh=dsummed_mh, config=config)
    again = rms_norm_backward(*inputs, dsummed_mh=dsummed_mh, config=config)
    expected = _backward_reference(*inputs, dsummed_mh)

    term = (dnormed_mh.abs().max() * weight_h.abs().max() * rstd_m.max()).item()
    assert_gradient_alike(found.dsummed_mh, expected.dsummed_mh, term)
    assert_gradient_alike(found.dweight_h, expected.dweight_h, term)
    assert torch.equal(found.dweight_h, again.dweight_h)


@pytest.mark.parametrize("config", [WHOLE, WALK, WIDE, None])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(device, shape, dtype, residual, config) -> None:
    check_backward(device, shape, dtype, residual, config)


def test_rows_that_do_not_fit_into_registers(device) -> None:
    check_forward(device, (5, 9000), torch.bfloat16, True, None)
    check_backward(device, (5, 9000), torch.bfloat16, True, None)


@pytest.mark.parametrize(
    ("name", "config"), [(name, config) for name, some in CANDIDATES.items() for config in some]
)
def test_every_candidate_config(device, name, config) -> None:
    columns = name.endswith("_columns")
    if name.startswith("forward"):
        check_forward_fp8(device, (3, 2048), E4M3, columns, config)
    elif name.startswith("backward"):
        check_backward(device, (3, 2048), torch.bfloat16, True, config)
    else:
        x_mh, weight_h = (filled(s, torch.bfloat16, device) for s in ((3, 2048), (2048,)))
        output = add_rms_norm(x_mh, None, weight_h, EPS)
        normed_mh = recompute_normed(x_mh, weight_h, output.rstd_m, config=config)
        assert isinstance(output.normed, Tensor)
        assert torch.equal(normed_mh, output.normed)


@pytest.mark.parametrize("config", [WHOLE, WALK])
def test_nothing_is_written_past_the_end(device, monkeypatch, config) -> None:
    margins = []
    new_empty = Tensor.new_empty

    def guarded(like: Tensor, shape=None, **options) -> Tensor:
        values = new_empty(like, like.shape if shape is None else shape, **options)
        memory = torch.full((values.nbytes + 2**14,), 77, dtype=torch.uint8, device=values.device)
        margins.append(memory[values.nbytes :])
        return memory[: values.nbytes].view(values.dtype).view(values.shape)

    monkeypatch.setattr(torch, "empty_like", guarded)
    monkeypatch.setattr(Tensor, "new_empty", guarded)
    check_backward(device, (17, 48), torch.bfloat16, True, config)
    check_forward(device, (17, 48), torch.bfloat16, True, config)
    check_forward_fp8(device, (17, 48), E4M3, True, config)
    # Twice 2 of backward, 3 + 1 of forward, 4 in FP8; the interpreter makes copies of its own.
    assert len(margins) >= 12
    assert all((margin == 77).all() for margin in margins)


def test_what_does_not_fit_is_refused(device) -> None:
    x_mh, weight_h = torch.zeros(4, 6, device=device), torch.ones(6, device=device)
    rstd_m, spec = torch.ones(4, device=device), spec_for(E4M3, 1.0, device)
    for x, residual, weight in (
        (torch.zeros(6, 4, device=device).t(), None, weight_h),
        (x_mh[0], None, weight_h),
        (x_mh, x_mh[:3], weight_h),
        (x_mh, torch.zeros(4, 12, device=device)[:, ::2], weight_h),
        (x_mh, None, weight_h[:5]),
    ):
        with pytest.raises(LitesparkError, match="contiguous matrices"):
            add_rms_norm(x, residual, weight, EPS)
    with pytest.raises(LitesparkError, match="contiguous matrices"):
        rms_norm_backward(x_mh[:, :1].expand(4, 6), x_mh, weight_h, rstd_m)
    with pytest.raises(LitesparkError, match="contiguous matrices"):
        rms_norm_backward(x_mh, x_mh, weight_h, rstd_m[:3])
    with pytest.raises(LitesparkError, match="contiguous matrices"):
        recompute_normed(x_mh, weight_h, torch.ones(4, 1, device=device))
    with pytest.raises(LitesparkError, match="`amax`"):
        add_rms_norm(x_mh, None, weight_h, EPS, quantize=spec, amax=spec.amax)
