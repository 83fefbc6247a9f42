"""Values of products: how matrices are stored, transposed, added, scaled."""

from __future__ import annotations

import pytest
import torch

from litespark.ops import cublaslt_product
from litespark.ops.cublaslt import Scales, supports
from litespark.ops.cublaslt_product import Stored
from litespark.ops.formats import E4M3, E5M2, FP8_MAX
from tests.unit.cublaslt.fake import BF16, FP32, integers, multiply, number, poisoned


@pytest.mark.parametrize(
    ("shape", "strides", "seen"),
    [
        ((3, 5), (5, 1), Stored(5, 3, 5, True)),
        ((3, 5), (8, 1), Stored(5, 3, 8, True)),
        ((3, 5), (1, 3), Stored(3, 5, 3, False)),
        ((3, 5), (1, 4), Stored(3, 5, 4, False)),
        ((1, 5), (1, 1), Stored(5, 1, 5, True)),  # the stride of one row means nothing
        ((1, 5), (99, 3), Stored(1, 5, 3, False)),
        ((5, 1), (1, 1), Stored(1, 5, 1, True)),
        ((5, 1), (7, 4), Stored(1, 5, 7, True)),
        ((1, 1), (0, 0), Stored(1, 1, 1, True)),
        ((3, 5), (10, 2), None),
        ((3, 5), (0, 1), None),  # expanded: rows on top of each other
        ((3, 5), (1, 0), None),
        ((3, 5), (4, 1), None),  # overlapping rows
    ],
)
def test_how_a_matrix_is_stored(shape, strides, seen):
    assert cublaslt_product.stored(torch.empty(100).as_strided(shape, strides)) == seen


def test_alignment_is_the_least_of_all_matrices():
    assert cublaslt_product.alignment((256, 512, 0, 48)) == 16
    assert cublaslt_product.alignment((256, 24, 0, 48)) == 8
    assert cublaslt_product.alignment((256, 24, 6, 48)) == 2


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("added", ["nothing", "in place", "elsewhere"])
@pytest.mark.parametrize("padding", [0, 3])
def test_bf16_products(engine, a_transposed, b_transposed, out_dtype, added, padding):
    m, n, k = 5, 7, 9
    a = integers(k, m, stride=padding and m + padding).t() if a_transposed else integers(m, k)
    b = integers(k, n).t() if b_transposed else integers(n, k, stride=padding and k + padding)
    out = poisoned(m, n, dtype=out_dtype, stride=padding and n + padding)
    add = None
    expected = a.double() @ b.double().t()
    if added == "in place":
        out.copy_(integers(m, n))
        add = out
    elif added == "elsewhere":
        add = integers(m, n, dtype=out_dtype, stride=padding and n + 2 * padding)
    expected = expected if add is None else expected + add.double()
    assert supports(a, b, out, add)
    assert multiply(engine, a, b, out, add) is out
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0)
    beyond = out.as_strided((m - 1, padding), (out.stride(0), 1), n)
    assert beyond.isnan().all(), "columns beyond the view are not written"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 4), (6, 1, 4), (6, 4, 1)])
def test_bf16_products_with_a_size_of_one(engine, shape):
    m, n, k = shape
    for a in (integers(m, k), integers(k, m).t()):
        for b in (integers(n, k), integers(k, n).t()):
            out = multiply(engine, a, b, poisoned(m, n, dtype=FP32))
            torch.testing.assert_close(out, a.float() @ b.float().t(), rtol=0, atol=0)


@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)])
@pytest.mark.parametrize("out_dtype", [BF16, FP32, E4M3, E5M2])
@pytest.mark.parametrize("added", [False, True])
def test_fp8_products(engine, a_dtype, b_dtype, out_dtype, added):
    m, n, k = 3, 16, 32
    a, b = integers(m, k, dtype=a_dtype), integers(n, k, dtype=b_dtype)
    out = poisoned(m, n, dtype=out_dtype)
    is_fp8 = out_dtype in FP8_MAX
    add = integers(m, n, dtype=BF16 if is_fp8 else out_dtype) if added else None
    if out_dtype == E5M2 and a_dtype == b_dtype:
        assert not supports(a, b, out, add)
        return
    amax = number(0.0)
    scales = Scales(number(0.5), number(4.0), *([number(64.0), amax] if is_fp8 else []))
    multiply(engine, a, b, out, add, scales)
    exact = 2.0 * (a.double() @ b.double().t()) + (add.double() if add is not None else 0)
    if is_fp8:
        limit = FP8_MAX[out_dtype]
        assert amax == exact.abs().max(), "before out_scale"
        exact = (64 * exact).clamp(-limit, limit).float().to(out_dtype)
    torch.testing.assert_close(out.float(), exact.to(out.dtype).float(), rtol=0, atol=0)


def test_the_scales_of_the_operands_are_not_swapped(engine, library):
    a, b = integers(16, 16, dtype=E4M3), integers(32, 16, dtype=E4M3)
    scales = Scales(number(2.0), number(3.0))
    multiply(engine, a, b, poisoned(16, 32, dtype=BF16), scales=scales)
    set_pointers = {
        arguments[1]: library.objects[arguments[0]][arguments[1]]
        for name, arguments in library.calls
        if name == "cublasLtMatmulDescSetAttribute"
    }
    assert set_pointers[17] == scales.b_scale_inv.data_ptr(), "cuBLASLt's A is b"
    assert set_pointers[18] == scales.a_scale_inv.data_ptr()
    assert 20 not in set_pointers, "scale_D of an output that is not FP8 is an error"
    assert 21 not in set_pointers


def test_amax_is_a_running_maximum(engine):
    ones = torch.ones(16, 16).to(E4M3)
    amax = number(0.0)
    for value, expected in [(3.0, 48.0), (1.0, 48.0), (5.0, 80.0)]:
        scales = Scales(number(value), number(1.0), number(1.0), amax)
        multiply(engine, ones, ones, poisoned(16, 16, dtype=E4M3), scales=scales)
        assert amax == expected
