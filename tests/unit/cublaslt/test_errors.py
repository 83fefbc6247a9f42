"""What the library refuses, and what the binding refuses before it is asked."""

from __future__ import annotations

import pytest
import torch

from litespark.errors import LitesparkError
from litespark.ops import cublaslt
from litespark.ops.cublaslt import Scales, supports
from litespark.ops.cublaslt_library import PROTOTYPES
from litespark.ops.formats import E4M3, E5M2
from tests.unit.cublaslt.fake import BF16, integers, multiply, number


@pytest.mark.parametrize("name", sorted(PROTOTYPES.keys() - {"cublasLtMatmulPreferenceDestroy"}))
def test_every_status_is_checked(engine, library, name):
    library.fail[name] = 14
    a, b = integers(16, 16, dtype=E4M3), integers(32, 16, dtype=E4M3)
    scales = Scales(number(1.0), number(1.0))
    with pytest.raises(LitesparkError) as error:
        multiply(engine, a, b, torch.empty(16, 32), scales=scales)
    message = str(error.value)
    assert message.startswith(name)
    assert "CUBLAS_STATUS_INTERNAL_ERROR" in message
    if name != "cublasLtCreate":  # which is about the device
        assert (
            "(float8_e4m3fn [16, 16]) @ (float8_e4m3fn [32, 16])^T -> float32 [16, 32]" in message
        )
    library.fail.clear()
    multiply(engine, a, b, torch.empty(16, 32), scales=scales)  # nothing half-made is left behind


def test_no_algorithm_is_an_error(engine, library):
    library.proposals = 0
    with pytest.raises(LitesparkError, match="no algorithm"):
        multiply(engine, integers(4, 8), integers(6, 8), torch.empty(4, 6))


MATRIX = torch.zeros(16, 16)


@pytest.mark.parametrize(
    ("a", "b", "out", "add", "problem"),
    [
        (MATRIX[0].to(BF16), MATRIX.to(BF16), MATRIX, None, "two dimensions"),
        (MATRIX[:, :8].to(BF16), MATRIX.to(BF16), MATRIX, None, "shapes"),
        (MATRIX.to(BF16), MATRIX.to(BF16), MATRIX[:8], None, "shapes"),
        (MATRIX.to(BF16), MATRIX.to(BF16), MATRIX, MATRIX[:8], "shape"),
        (MATRIX[:0].to(BF16), MATRIX.to(BF16), MATRIX[:0], None, "size is 0"),
        (MATRIX, MATRIX, MATRIX, None, "both bfloat16, or both FP8"),
        (MATRIX.to(BF16), MATRIX.to(E4M3), MATRIX, None, "both bfloat16, or both FP8"),
        (MATRIX.to(E5M2), MATRIX.to(E5M2), MATRIX, None, "not both E5M2"),
        (MATRIX.to(BF16), MATRIX.to(BF16), MATRIX.to(E4M3), None, "one of bfloat16, float32"),
        (MATRIX.to(E4M3), MATRIX.to(E4M3), MATRIX.to(E5M2), None, "float8_e4m3fn"),
        (MATRIX.to(BF16), MATRIX.to(BF16), MATRIX, MATRIX.to(BF16), "out's type"),
        (MATRIX.to(E4M3), MATRIX.to(E4M3), MATRIX.to(E4M3), MATRIX.to(E4M3), "bfloat16 where"),
        (
            MATRIX.to(BF16),
            MATRIX.to(BF16).as_strided((16, 8), (2, 2)),
            MATRIX[:, :8],
            None,
            "shape",
        ),
        (MATRIX.to(BF16), torch.zeros(16, 32).to(BF16)[:, ::2], MATRIX, None, "contiguous"),
        (MATRIX.to(BF16), MATRIX.to(BF16), MATRIX.t(), None, "rows of out"),
        (MATRIX.to(BF16), MATRIX.to(BF16), MATRIX, MATRIX.t(), "rows of out and add"),
        (MATRIX.to(E4M3).t(), MATRIX.to(E4M3), MATRIX, None, "contiguous along k"),
        (MATRIX.to(E4M3), MATRIX.to(E4M3).t(), MATRIX, None, "contiguous along k"),
        (MATRIX.to(E4M3), MATRIX[:8].to(E4M3), MATRIX[:, :8], None, "multiples of 16"),
        (MATRIX[:, :8].to(E4M3), MATRIX[:, :8].to(E4M3), MATRIX, None, "multiples of 16"),
        (MATRIX.to(E4M3), MATRIX.to(E4M3), torch.zeros(16, 24)[:, :16], None, "multiples of 16"),
        (MATRIX.to(E4M3), torch.zeros(257).to(E4M3)[1:].view(16, 16), MATRIX, None, "multiples"),
    ],
)
def test_what_cannot_be_multiplied(engine, library, a, b, out, add, problem):
    assert not supports(a, b, out, add)
    with pytest.raises(LitesparkError, match="cuBLASLt cannot compute") as error:
        multiply(engine, a, b, out, add)
    assert problem in str(error.value)
    assert library.names() == []


def test_add_that_is_out_in_another_layout():
    memory = torch.zeros(64)
    out, add = memory.as_strided((4, 4), (4, 1)), memory.as_strided((4, 4), (8, 1))
    assert not supports(integers(4, 8), integers(4, 8), out, add)
    assert supports(integers(4, 8), integers(4, 8), out, memory.as_strided((4, 4), (4, 1)))


def test_scales_that_do_not_fit(engine):
    one, bf16, fp8 = number(1.0), integers(16, 16), integers(16, 16, dtype=E4M3)
    out = torch.empty(16, 16)
    with pytest.raises(LitesparkError, match="scales are for FP8 operands"):
        multiply(engine, bf16, bf16, out, scales=Scales(one, one))
    with pytest.raises(LitesparkError, match="for an FP8 output"):
        multiply(engine, fp8, fp8, out, scales=Scales(one, one, one))
    with pytest.raises(LitesparkError, match=r"fp32 \[1\]"):
        Scales(one, one.double())
    with pytest.raises(LitesparkError, match=r"fp32 \[1\]"):
        Scales(one, one, torch.ones(2))


def test_cpu_tensors_are_refused():
    with pytest.raises(LitesparkError, match="CUDA tensors only"):
        cublaslt.matmul(integers(4, 8), integers(4, 8), torch.empty(4, 4))


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch brings the library")
def test_a_cpu_build_of_torch_has_no_library():
    assert not cublaslt.is_available()
    assert cublaslt.tuned_report() == []
