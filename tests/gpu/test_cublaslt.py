"""The binding of cuBLASLt on a GPU, against fp64 products.

With small integers every product and sum is exact (below 2^11 in size: even FP8's short accumulator
holds them), so that results are compared bit by bit: what is left is the final rounding, which is
torch's.  Random values test the accuracy of the sums.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from litespark.errors import LitesparkError
from litespark.ops import cublaslt
from litespark.ops.cublaslt import Scales, matmul, supports, tuned_report, tuning
from litespark.ops.formats import E4M3, E5M2, FP8_MAX

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP32 = torch.bfloat16, torch.float32
FP8_PAIRS = [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)]
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="needs FP8 tensor cores",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["first", "tuned"], autouse=True)
def choice(request):
    """Each test without tuning, then with it: a product that was tuned stays so."""
    with tuning(request.param):
        yield


def integers(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Values of -2 to 2: a sum over k <= 512 stays within 2048."""
    return torch.randint(-2, 3, shape, device="cuda").to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda").to(dtype)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], device="cuda")


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double().t()


def assert_equal(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the exact result, rounded once."""
    rounded = expected.float().to(result.dtype)
    torch.testing.assert_close(result.float(), rounded.float(), rtol=0, atol=0)


def test_the_library_is_found():
    assert cublaslt.is_available()


@pytest.mark.parametrize("shape", [(64, 48, 128), (1, 8, 16), (37, 53, 71), (130, 1, 7), (5, 3, 1)])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("added", ["nothing", "in place", "elsewhere"])
def test_bf16_products(shape, out_dtype, added):
    """All four layouts, of even and odd sizes."""
    m, n, k = shape
    for a, b in itertools.product(
        (integers(m, k), integers(k, m).t()), (integers(n, k), integers(k, n).t())
    ):
        out = poisoned(m, n, dtype=out_dtype)
        expected, add = exact(a, b), None
        if added != "nothing":
            add = integers(m, n, dtype=out_dtype)
            expected += add.double()
        if added == "in place":
            out.copy_(add)
            add = out
        assert supports(a, b, out, add)
        assert matmul(a, b, out, add_mn=add) is out
        assert_equal(out, expected)


def test_views_with_wide_rows():
    a, b = integers(40, 96)[:, 8:40], integers(32, 64).t()[:24]
    out, add = poisoned(40, 80, dtype=FP32), integers(40, 32, dtype=FP32)[:, :24]
    matmul(a, b, out[:, 16:40], add_mn=add)
    assert_equal(out[:, 16:40], exact(a, b) + add.double())
    assert out[:, :16].isnan().all()
    assert out[:, 40:].isnan().all()


def test_a_misaligned_operand():
    memory = integers(32 * 64 + 1)
    b, out = integers(16, 64), poisoned(32, 16, dtype=BF16)
    for start in (0, 1):
        a = memory[start : start + 32 * 64].view(32, 64)
        matmul(a, b, out)
        assert_equal(out, exact(a, b))


@needs_fp8
@pytest.mark.parametrize("dtypes", FP8_PAIRS)
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize("added", ["nothing", "in place", "elsewhere"])
@pytest.mark.parametrize("fast", [False, True])
def test_fp8_products(dtypes, out_dtype, added, fast):
    for m, n, k in [(64, 48, 256), (5, 16, 16), (128, 256, 512)]:
        a, b = integers(m, k, dtype=dtypes[0]), integers(n, k, dtype=dtypes[1])
        scales = Scales(number(0.5), number(4.0))
        out, add = poisoned(m, n, dtype=out_dtype), None
        expected = 2 * exact(a, b)
        if added != "nothing":
            add = integers(m, n, dtype=out_dtype)
            expected += add.double()
        if added == "in place":
            out.copy_(add)
            add = out
        matmul(a, b, out, add_mn=add, scales=scales, fast_accumulate=fast)
        assert_equal(out, expected)


@needs_fp8
@pytest.mark.parametrize("dtypes", FP8_PAIRS)
@pytest.mark.parametrize("out_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("out_scale", [1 / 64, 1.0, 1024.0], ids=["small", "one", "saturates"])
def test_fp8_outputs(dtypes, out_dtype, added, out_scale):
    m, n, k = 64, 48, 256
    a, b = integers(m, k, dtype=dtypes[0]), integers(n, k, dtype=dtypes[1])
    out = poisoned(m, n, dtype=out_dtype)
    add = integers(m, n, dtype=BF16) if added else None
    if out_dtype == E5M2 and dtypes == (E4M3, E4M3):
        assert not supports(a, b, out, add)
        return
    amax = number(0.0)
    scales = Scales(number(0.5), number(4.0), number(out_scale), amax)
    matmul(a, b, out, add_mn=add, scales=scales)
    expected = 2 * exact(a, b) + (0 if add is None else add.double())
    assert amax.double() == expected.abs().max(), "before out_scale"
    limit = FP8_MAX[out_dtype]
    assert_equal(out, (out_scale * expected).clamp(-limit, limit))


@needs_fp8
def test_amax_is_a_running_maximum():
    """The library overwrites its own: a smaller product after a larger one must not keep it."""
    ones, amax = torch.ones(64, 64, device="cuda").to(E4M3), number(0.0)
    for value, expected in [(3.0, 192.0), (1.0, 192.0), (5.0, 320.0)]:
        scales = Scales(number(value), number(1.0), number(1.0), amax)
        matmul(ones, ones, poisoned(64, 64, dtype=E4M3), scales=scales)
        assert amax == expected
    alone = number(0.0)
    scales = Scales(number(1.0), number(1.0), number(1.0), alone)
    matmul(ones, ones, poisoned(64, 64, dtype=E4M3), scales=scales)
    assert alone == 64.0


@needs_fp8
def test_without_scales_the_factors_are_one():
    a, b = integers(32, 64, dtype=E4M3), integers(16, 64, dtype=E5M2)
    assert_equal(matmul(a, b, poisoned(32, 16, dtype=FP32)), exact(a, b))
    assert_equal(matmul(a, b, poisoned(32, 16, dtype=E5M2)), exact(a, b))


@needs_fp8
def test_one_kind_with_other_matrices_and_scales():
    """The plan of the first call serves the others: only addresses change."""
    kept = []
    for value in (1.0, 2.0, 0.25, 2.0):
        a, b = integers(48, 64, dtype=E4M3), integers(32, 64, dtype=E4M3)
        out = integers(48, 32, dtype=FP32)
        scales = Scales(number(value), number(2.0))
        kept.append((a, b, scales, out))
        expected = out.double() + 2 * value * exact(a, b)
        matmul(a, b, out, add_mn=out, scales=scales)
        assert_equal(out, expected)


@pytest.mark.parametrize("out_dtype", [BF16, FP32])
def test_bf16_accuracy(out_dtype):
    """Products of bf16 are exact in fp32.  A tensor core adds 16 at a time to the sum: k / 16 = 2^8
    additions, each of which errs by at most 2^-23 of the sum, so by 2^-15 of it even if all err
    alike (partial sums in bf16 would err by 2^-8).  Rounding to bf16 adds 2^-8 of an element."""
    m, n, k = 256, 192, 4096
    a = torch.randn(m, k, device="cuda", dtype=BF16)
    b = torch.randn(n, k, device="cuda", dtype=BF16)
    expected = exact(a, b)
    error = matmul(a, b, poisoned(m, n, dtype=out_dtype)).double() - expected
    rounding = 2**-8 if out_dtype == BF16 else 0.0
    assert error.norm() <= (2**-15 + rounding) * expected.norm()


@needs_fp8
@pytest.mark.parametrize("dtypes", FP8_PAIRS)
def test_fp8_accuracy(dtypes):
    """Hopper adds 32 products at a time, each cut at about 2^-13 of the largest, and moves the sum
    to fp32 every 128.  Products of normal values reach 10 in 128: cuts of 2^-13 * 10 with either
    sign, 4096 of them, make 0.05 where the result has the size of sqrt(4096) = 64: 2^-10 of it."""
    m, n, k = 256, 192, 4096
    a = torch.randn(m, k, device="cuda").to(dtypes[0])
    b = torch.randn(n, k, device="cuda").to(dtypes[1])
    expected = exact(a, b)
    out = matmul(a, b, poisoned(m, n, dtype=FP32), scales=Scales(number(1.0), number(1.0)))
    assert (out.double() - expected).norm() <= 2**-9 * expected.norm()


def test_a_side_stream():
    """Work is queued on the current stream: behind what is there, ahead of what follows."""
    side = torch.cuda.Stream()
    b = integers(256, 256)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        a = integers(256, 256)  # behind the sleep: another stream would read other values
        out = matmul(a, b, poisoned(256, 256, dtype=FP32))
        result = out.clone()
    side.synchronize()
    assert_equal(result, exact(a, b))


def test_a_captured_graph():
    """A kind first met under capture takes the first algorithm; replays use new values."""
    side = torch.cuda.Stream()
    a, b, out = integers(96, 64), integers(80, 64), poisoned(96, 80, dtype=FP32)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        matmul(integers(16, 16), integers(16, 16), poisoned(16, 16, dtype=FP32))  # makes the handle
    side.synchronize()
    rows = len(tuned_report())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        matmul(a, b, out)
    assert len(tuned_report()) == rows
    a.copy_(integers(96, 64))
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(out, exact(a, b))


def test_the_report_of_tuning():
    """Sizes of their own, as what was tuned before is not timed again."""
    m, n, k = (168, 136, 328) if tuning.enabled else (168, 136, 344)
    out = torch.zeros(m, n, device="cuda")
    a, b = integers(m, k), integers(n, k)
    matmul(a, b, out, add_mn=out)
    assert_equal(out, exact(a, b))  # added once, though many trials ran
    rows = [row for row in tuned_report() if (row.m, row.n, row.k) == (m, n, k)]
    if not tuning.enabled:
        assert rows == []
        return
    for row in rows:  # none where the library proposed only one
        assert 1 < len(row.times_ms) <= 8
        assert 0 < row.best_ms <= row.first_ms
        assert row.times_ms[row.index] == row.best_ms
        assert row.layout == "TN"


@needs_fp8
def test_what_is_refused():
    a, out = integers(16, 16, dtype=E5M2), poisoned(16, 16, dtype=FP32)
    with pytest.raises(LitesparkError, match="not both E5M2"):
        matmul(a, a, out)
    b = integers(16, 16, dtype=E4M3)
    with pytest.raises(LitesparkError, match="different devices"):
        matmul(a, b.cpu(), out)
    with pytest.raises(LitesparkError, match="another device"):
        matmul(a, b, out, scales=Scales(torch.ones(1), torch.ones(1)))
    with pytest.raises(LitesparkError, match="different devices"):
        Scales(torch.ones(1), number(1.0))
    with pytest.raises(LitesparkError, match="CUDA tensors only"):
        matmul(a.cpu(), b.cpu(), out.cpu())
