"""Rotary embedding and QKV split: kernel against reference, reference against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig
from litespark.ops.formats import E4M3, E5M2, Fp8Matrix, QuantizeSpec, saturate
from litespark.ops.rope import (
    CANDIDATES,
    _split_rope_backward_reference,
    _split_rope_reference,
    split_rope,
    split_rope_backward,
)
from tests.kernels.test_quantize import spec_for

SMALL = LaunchConfig(16, 2)

# s, b, groups, query heads a group, head size
SHAPES = [
    (5, 4, 2, 8, 8),  # paper-3b's grouping
    (1, 1, 1, 1, 2),
    (7, 3, 3, 1, 6),  # multi-head attention
    (17, 1, 1, 5, 10),
    (3, 2, 2, 2, 64),
    (3, 2, 1, 2, 80),
    (2, 2, 1, 2, 96),
    (2, 2, 1, 1, 128),
    (2, 1, 1, 1, 192),
    (1, 2, 1, 1, 256),
]


def angles(s: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle_sr = torch.rand(s, head_dim // 2, device=device) * 6.3
    return angle_sr.cos(), angle_sr.sin()


def random_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    s, b, groups, queries, head_dim = shape
    heads = (groups * queries, groups, groups)
    q, k, v = (torch.randn(s, b, n, head_dim, device=device).to(dtype) for n in heads)
    return q, k, v


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the kernel's fused multiply-adds and the one rounding after them.

    The two fp32 results differ by at most 2^-23 of the terms' sum, which randn keeps below 16; the
    rounding to bf16 or fp16 may then fall to the neighbouring number, 2^-7 or 2^-10 away.
    """
    step = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}[actual.dtype]
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=step, atol=2**-19)
    if actual.dtype != torch.float32:  # and only where it lies at a rounding boundary
        assert (actual != expected).sum() <= 1 + 0.01 * actual.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(device, shape, dtype) -> None:
    s, b, groups, queries, head_dim = shape
    qkv_sbw = torch.randn(s, b, groups * (queries + 2) * head_dim, device=device).to(dtype)
    cos, sin = angles(s, head_dim, device)
    result = split_rope(qkv_sbw, cos, sin, num_groups=groups, head_dim=head_dim, config=SMALL)
    expected = _split_rope_reference(qkv_sbw, cos, sin, groups, head_dim)
    for actual, reference in zip(result, expected, strict=True):
        assert actual.is_contiguous()
        assert_close(actual, reference)
    assert torch.equal(result[2], expected[2])


def test_reference_is_the_formula() -> None:
    """Every output element, from the definition, one by one."""
    s, b, groups, queries, head_dim = 2, 2, 2, 3, 4
    qkv_sbw = torch.randn(s, b, groups * (queries + 2) * head_dim)
    cos, sin = angles(s, head_dim, torch.device("cpu"))
    q, k, v = split_rope(qkv_sbw, cos, sin, num_groups=groups, head_dim=head_dim)
    half = head_dim // 2
    for i in range(s):
        for j in range(b):
            row = qkv_sbw[i, j].reshape(groups, queries + 2, head_dim)
            for group in range(groups):
                assert torch.equal(v[i, j, group], row[group, queries + 1])
                turned = [(q[i, j, group * queries + p], row[group, p]) for p in range(queries)]
                for out, x in [*turned, (k[i, j, group], row[group, queries])]:
                    for r in range(half):
                        low = x[r] * cos[i, r] - x[r + half] * sin[i, r]
                        high = x[r + half] * cos[i, r] + x[r] * sin[i, r]
                        torch.testing.assert_close(out[r], low)
                        torch.testing.assert_close(out[r + half], high)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_reference_backward_is_autograds(shape) -> None:
    s, b, groups, queries, head_dim = shape
    qkv_sbw = torch.randn(s, b, groups * (queries + 2) * head_dim, requires_grad=True)
    cos, sin = angles(s, head_dim, torch.device("cpu"))
    outputs = _split_rope_reference(qkv_sbw, cos, sin, groups, head_dim)
    gradients = random_gradients(shape, torch.float32, torch.device("cpu"))
    torch.autograd.backward(outputs, gradients)
    result = split_rope_backward(*gradients, cos, sin)
    assert isinstance(result, Tensor)
    assert qkv_sbw.grad is not None
    # The same products and one sum of two, in another order: an fp32 rounding each.
    torch.testing.assert_close(result, qkv_sbw.grad.reshape(s * b, -1), rtol=2**-22, atol=2**-21)


def test_rotation_keeps_lengths_and_undoes_itself(device) -> None:
    s, b, groups, queries, head_dim = 6, 2, 2, 3, 16
    qkv_sbw = torch.randn(s, b, groups * (queries + 2) * head_dim, device=device)
    cos, sin = angles(s, head_dim, device)
    q, k, v = split_rope(qkv_sbw, cos, sin, num_groups=groups, head_dim=head_dim, config=SMALL)
    back = split_rope_backward(q, k, v, cos, sin, config=SMALL)
    # cos^2 + sin^2 is 1 up to two fp32 roundings, and each direction adds two more.
    assert isinstance(back, Tensor)
    torch.testing.assert_close(back.view_as(qkv_sbw), qkv_sbw, rtol=2**-20, atol=2**-19)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(device, shape, dtype) -> None:
    gradients = random_gradients(shape, dtype, device)
    cos, sin = angles(shape[0], shape[-1], device)
    result = split_rope_backward(*gradients, cos, sin, config=SMALL)
    assert isinstance(result, Tensor)
    assert result.is_contiguous()
    assert_close(result, _split_rope_backward_reference(gradients, cos, sin).to(dtype))


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_quantised(device, shape, dtype, fp8) -> None:
    gradients = random_gradients(shape, dtype, device)
    cos, sin = angles(shape[0], shape[-1], device)
    # Some values saturate: 4 * 150 is beyond 448, and 4 * 20000 beyond 57344.
    scale = 150.0 if fp8 == E4M3 else 20000.0
    spec, expected_spec = (spec_for(fp8, scale, device) for _ in range(2))

    result = split_rope_backward(*gradients, cos, sin, quantize=spec, config=SMALL)

    assert isinstance(result, Fp8Matrix)
    assert result.rows_mk is not None
    assert result.columns_km is not None
    assert result.columns_km.is_contiguous()
    assert torch.equal(result.rows_mk.view(torch.uint8), result.columns_km.view(torch.uint8).t())
    exact = _split_rope_backward_reference(gradients, cos, sin)
    assert_one_step(result.rows_mk, saturate(exact, expected_spec))
    # Fused multiply-adds: the largest value may differ by an fp32 rounding.
    torch.testing.assert_close(spec.amax, expected_spec.amax, rtol=2**-22, atol=0)


def assert_one_step(actual: Tensor, expected: Tensor) -> None:
    """Equal, but for the neighbouring number where the fp32 value lies at a rounding boundary."""
    assert actual.dtype == expected.dtype
    distance = (actual.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    # Codes of one sign are consecutive; +0 and -0 are 128 apart, and neighbours of each other.
    signed_zeros = (actual.float() == 0) & (expected.float() == 0)
    distance[signed_zeros] = 0
    assert distance.max() <= 1
    assert distance.sum() <= 1 + 0.002 * actual.numel()


def batch_first(gradient_sbnd: Tensor) -> Tensor:
    return gradient_sbnd.transpose(0, 1).contiguous().transpose(0, 1)


def heads_first(gradient_sbnd: Tensor) -> Tensor:
    return gradient_sbnd.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


def padded(gradient_sbnd: Tensor) -> Tensor:
    return torch.nn.functional.pad(gradient_sbnd, (0, 3))[..., :-3]


@pytest.mark.parametrize("layout", [batch_first, heads_first, padded])
@pytest.mark.parametrize("fp8", [None, E5M2])
def test_gradients_in_any_memory_order(device, layout, fp8) -> None:
    shape = (5, 3, 2, 3, 8)
    dq, dk, dv = random_gradients(shape, torch.bfloat16, device)
    cos, sin = angles(5, 8, device)
    spec, other = ((spec_for(fp8, 100.0, device) if fp8 else None) for _ in range(2))
    # Each with strides of its own.
    result = split_rope_backward(
        layout(dq), layout(dk), batch_first(dv), cos, sin, quantize=spec, config=SMALL
    )
    expected = split_rope_backward(dq, dk, dv, cos, sin, quantize=other, config=SMALL)
    if isinstance(result, Fp8Matrix):
        assert isinstance(expected, Fp8Matrix)
        assert torch.equal(result.dequantize(), expected.dequantize())
    else:
        assert torch.equal(result, expected)


def test_qkv_in_any_memory_order(device) -> None:
    qkv = torch.randn(5, 3, 40 + 6, device=device).bfloat16()
    cos, sin = angles(5, 8, device)
    part = qkv[..., 3:43]
    for view in (part, part.transpose(0, 1).contiguous().transpose(0, 1)):
        result = split_rope(view, cos, sin, num_groups=1, head_dim=8, config=SMALL)
        expected = split_rope(part.contiguous(), cos, sin, num_groups=1, head_dim=8, config=SMALL)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_amax_is_of_the_values_returned(device) -> None:
    gradients = random_gradients((5, 3, 2, 3, 8), torch.bfloat16, device)
    cos, sin = angles(5, 8, device)
    amax = torch.zeros(1, device=device)
    result = split_rope_backward(*gradients, cos, sin, amax=amax, config=SMALL)
    assert isinstance(result, Tensor)
    assert torch.equal(amax, result.abs().amax().float().reshape(1))
    amax.fill_(100.0)
    split_rope_backward(*gradients, cos, sin, amax=amax, config=SMALL)
    assert amax.item() == 100


def test_nan_and_infinity_stay_in_their_pair(device) -> None:
    qkv = torch.ones(3, 1, 5 * 8, device=device)
    qkv[1, 0, 4 * 8 + 2] = torch.inf  # in the value head, which is not turned
    qkv[2, 0, 1] = torch.nan
    cos, sin = angles(3, 8, device)
    q, k, v = split_rope(qkv, cos, sin, num_groups=1, head_dim=8, config=SMALL)
    assert q.isnan().sum() == 2
    assert q[2, 0, 0, [1, 5]].isnan().all()
    assert k.isfinite().all()
    assert v[1, 0, 0, 2] == torch.inf
    assert v.isinf().sum() == 1
    assert v.isfinite().sum() == v.numel() - 1


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_every_candidate_config(device, name) -> None:
    shape = (9, 2, 1, 3, 12)
    gradients = random_gradients(shape, torch.bfloat16, device)
    cos, sin = angles(9, 12, device)
    exact = _split_rope_backward_reference(gradients, cos, sin)
    for config in CANDIDATES[name]:
        if name == "forward":
            qkv = exact.bfloat16().view(9, 2, -1)
            result = split_rope(qkv, cos, sin, num_groups=1, head_dim=12, config=config)
            expected = _split_rope_reference(qkv, cos, sin, 1, 12)
            for actual, reference in zip(result, expected, strict=True):
                assert_close(actual, reference)
        elif name == "backward":
            result = split_rope_backward(*gradients, cos, sin, config=config)
            assert isinstance(result, Tensor)
            assert_close(result, exact.bfloat16())
        else:
            spec: QuantizeSpec = spec_for(E4M3, 50.0, device)
            result = split_rope_backward(*gradients, cos, sin, quantize=spec, config=config)
            assert isinstance(result, Fp8Matrix)
            assert result.columns_km is not None
            assert_one_step(result.columns_km.t(), saturate(exact, spec_for(E4M3, 50.0, device)))


@pytest.mark.parametrize("head_dim", [128, 192, 256, 258])
def test_default_config_of_wide_heads(device, head_dim) -> None:
    gradients = random_gradients((3, 2, 1, 2, head_dim), torch.bfloat16, device)
    cos, sin = angles(3, head_dim, device)
    exact = _split_rope_backward_reference(gradients, cos, sin)
    rows = split_rope_backward(*gradients, cos, sin)
    matrix = split_rope_backward(*gradients, cos, sin, quantize=spec_for(E4M3, 50.0, device))
    outputs = split_rope(exact.view(3, 2, -1), cos, sin, num_groups=1, head_dim=head_dim)
    assert isinstance(rows, Tensor)
    assert_close(rows, exact.bfloat16())
    assert isinstance(matrix, Fp8Matrix)
    assert matrix.rows_mk is not None
    assert_one_step(matrix.rows_mk, saturate(exact, spec_for(E4M3, 50.0, device)))
    for output, gradient in zip(outputs, gradients, strict=True):
        torch.testing.assert_close(output, gradient.float(), rtol=2**-20, atol=2**-19)


def test_the_reference_path_returns_the_same_kinds() -> None:
    """Outside `kernels_on_cpu`, plain CPU tensors."""
    gradients = random_gradients((4, 2, 2, 2, 8), torch.bfloat16, torch.device("cpu"))
    cos, sin = angles(4, 8, torch.device("cpu"))
    spec = spec_for(E5M2, 10.0, torch.device("cpu"))
    amax = torch.zeros(1)
    rows = split_rope_backward(*gradients, cos, sin, amax=amax)
    matrix = split_rope_backward(*gradients, cos, sin, quantize=spec)
    assert isinstance(rows, Tensor)
    assert isinstance(matrix, Fp8Matrix)
    assert torch.equal(amax, rows.abs().amax().float().reshape(1))
    torch.testing.assert_close(matrix.dequantize(), rows.float(), rtol=0.13, atol=1e-5)


def test_wrong_arguments_are_refused(device) -> None:
    qkv = torch.zeros(4, 2, 5 * 8, device=device)
    cos, sin = angles(4, 8, device)

    def split(qkv=qkv, cos=cos, sin=sin, num_groups=1, head_dim=8) -> None:
        split_rope(qkv, cos, sin, num_groups=num_groups, head_dim=head_dim)

    with pytest.raises(LitesparkError, match="odd"):
        split(head_dim=5)
    with pytest.raises(LitesparkError, match="fused QKV of width 40"):
        split(num_groups=2)
    with pytest.raises(LitesparkError, match="fused QKV of width 16"):
        split(qkv=qkv[..., :16])
    with pytest.raises(LitesparkError, match="cos must be"):
        split(cos=cos[:3])
    with pytest.raises(LitesparkError, match="sin must be"):
        split(sin=sin.bfloat16())
    with pytest.raises(LitesparkError, match="last dimension"):
        split(qkv=torch.zeros(4, 2, 80, device=device)[..., ::2])

    dq, dk, dv = random_gradients((4, 2, 1, 3, 8), torch.float32, device)
    with pytest.raises(LitesparkError, match="belong together"):
        split_rope_backward(dq, dk[:3], dv, cos, sin)
    with pytest.raises(LitesparkError, match="one dtype"):
        split_rope_backward(dq, dk.bfloat16(), dv, cos, sin)
    with pytest.raises(LitesparkError, match="do not divide"):
        split_rope_backward(dq, dk.repeat(1, 1, 2, 1), dv.repeat(1, 1, 2, 1), cos, sin)
    spec = spec_for(E4M3, 1.0, device)
    with pytest.raises(LitesparkError, match="comes with"):
        split_rope_backward(dq, dk, dv, cos, sin, quantize=spec, amax=spec.amax)
