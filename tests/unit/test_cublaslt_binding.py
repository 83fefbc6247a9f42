"""The binding of cuBLASLt without a GPU, against a library that multiplies column-major on the CPU.

The fake is written from the documentation, not from the binding: it knows descriptors, column-major
layouts, op(A) op(B), scales and amax, and checks every call against the C prototypes.  All values
are small integers, so that sums are exact and results can be compared bit by bit.
"""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch

from litespark.errors import LitesparkError
from litespark.ops import cublaslt, cublaslt_library, cublaslt_product
from litespark.ops.cublaslt import Cuda, Engine, Scales, supports, tuning
from litespark.ops.cublaslt_library import PROTOTYPES, HeuristicResult
from litespark.ops.cublaslt_product import Product, Stored
from litespark.ops.formats import E4M3, E5M2, FP8_MAX

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = {0: FP32, 14: BF16, 28: E4M3, 29: E5M2}
NOT_SUPPORTED = 15


class FakeLibrary:
    """Stands for libcublasLt; `calls` are (name, arguments) in order."""

    def __init__(self, proposals: int = 1) -> None:
        self.calls: list[tuple[str, tuple]] = []
        self.fail: dict[str, int] = {}
        self.broken_algorithms: set[int] = set()  # which do not launch
        self.bad_results: set[int] = set()  # whose state is not success
        self.proposals = proposals
        self.objects: dict[int, dict] = {}

    def __getattr__(self, name):
        return partial(self._call, name)

    def _call(self, name, *arguments):
        prototype = PROTOTYPES[name]
        assert len(arguments) == len(prototype), name
        for kind, argument in zip(prototype, arguments, strict=True):
            kind.from_param(argument)  # what ctypes does with it; raises for the wrong kind
        self.calls.append((name, arguments))
        if name in self.fail:
            return self.fail[name]
        return getattr(self, f"_{name}")(*arguments) or 0

    def names(self) -> list[str]:
        names = [name.removeprefix("cublasLt") for name, _ in self.calls]
        self.calls.clear()
        return names

    def _new(self, where, **content) -> None:
        handle = 4096 + 16 * len(self.objects)
        self.objects[handle] = content
        where._obj.value = handle

    def _cublasLtCreate(self, where):
        self._new(where)

    def _cublasLtMatmulDescCreate(self, where, compute, scale):
        assert (compute, scale) == (68, 0), "CUBLAS_COMPUTE_32F, CUDA_R_32F"
        self._new(where)

    def _cublasLtMatrixLayoutCreate(self, where, dtype, rows, cols, ld):
        assert ld >= rows
        self._new(where, dtype=DTYPES[dtype], rows=rows, cols=cols, ld=ld)

    def _cublasLtMatmulPreferenceCreate(self, where):
        self._new(where)

    def _cublasLtMatmulPreferenceDestroy(self, preference):
        assert self.objects[preference] is not None
        self.objects[preference] = None

    def _set(self, sizes, target, attribute, value, size):
        assert size == sizes[attribute], "cuBLASLt compares the sizes and refuses"
        address = value if isinstance(value, int) else ctypes.addressof(value._obj)
        content = ctypes.string_at(address, size)
        self.objects[target][attribute] = int.from_bytes(content, "little", signed=True)

    def _cublasLtMatmulDescSetAttribute(self, *arguments):
        self._set({3: 4, 4: 4, 17: 8, 18: 8, 20: 8, 21: 8, 25: 1}, *arguments)

    def _cublasLtMatmulPreferenceSetAttribute(self, *arguments):
        self._set({1: 8, 3: 4, 5: 4, 6: 4, 7: 4, 8: 4}, *arguments)

    def _cublasLtMatmulAlgoGetHeuristic(self, handle, operation, a, b, c, d, preference, *rest):
        count, results, returned = rest
        assert self.objects[preference][1] == cublaslt.WORKSPACE_BYTES
        assert self.objects[preference][3] == 2, "fp32 partial sums only"
        assert self.objects[c]["dtype"] == (
            BF16 if self.objects[d]["dtype"] in FP8_MAX else self.objects[d]["dtype"]
        )
        found = min(self.proposals, count)
        for index in range(found):
            results._obj[index].algo.data[0] = 100 + index
            results._obj[index].state = NOT_SUPPORTED if index in self.bad_results else 0
        returned._obj.value = found

    def matrix(self, address: int, layout: int) -> torch.Tensor:
        """The column-major matrix at an address, as a view of that memory."""
        seen = self.objects[layout]
        elements = (seen["cols"] - 1) * seen["ld"] + seen["rows"]
        buffer = (ctypes.c_uint8 * (elements * seen["dtype"].itemsize)).from_address(address)
        flat = torch.frombuffer(buffer, dtype=torch.uint8).view(seen["dtype"])
        return flat.as_strided((seen["rows"], seen["cols"]), (1, seen["ld"]))

    def _cublasLtMatmul(
        self, handle, operation, alpha, a, ad, b, bd, beta, c, cd, d, dd, algorithm, *rest
    ):
        if ctypes.c_uint64.from_address(algorithm).value - 100 in self.broken_algorithms:
            return NOT_SUPPORTED
        workspace, workspace_bytes, _ = rest
        assert workspace
        assert workspace_bytes == cublaslt.WORKSPACE_BYTES
        attributes = self.objects[operation]

        def number(address: int | None) -> float:
            return ctypes.c_float.from_address(address).value if address else 1.0

        op_a, op_b = self.matrix(a, ad).double(), self.matrix(b, bd).double()
        op_a = op_a.t() if attributes[3] else op_a
        op_b = op_b.t() if attributes[4] else op_b
        factor = number(attributes.get(17)) * number(attributes.get(18)) * number(alpha)
        result = factor * (op_a @ op_b)
        if number(beta) != 0:
            result += number(beta) * self.matrix(c, cd).double()
        if attributes.get(21):
            amax = ctypes.c_float.from_address(attributes[21])
            amax.value = float(result.abs().max())
        result *= number(attributes.get(20))
        target = self.matrix(d, dd)
        limit = FP8_MAX.get(target.dtype, float("inf"))
        target.copy_(result.clamp(-limit, limit).float().to(target.dtype))
        return 0

    @staticmethod
    def cublasLtGetStatusName(status):
        return {NOT_SUPPORTED: b"CUBLAS_STATUS_NOT_SUPPORTED", 14: b"CUBLAS_STATUS_INTERNAL_ERROR"}[
            status
        ]


class FakeCuda(Cuda):
    def __init__(self) -> None:
        self.address, self.capturing, self.times = 7, False, [1.0]

    def stream(self, device: int) -> int:
        return self.address

    def is_capturing(self) -> bool:
        return self.capturing

    def median_milliseconds(self, launches):
        statuses = [launch() for launch in launches]
        return [
            float("inf") if status else time
            for status, time in zip(statuses, self.times, strict=True)
        ]


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def engine(library, cuda) -> Engine:
    torch.manual_seed(0)
    return Engine(library, cuda)


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    monkeypatch.setattr(cublaslt, "WORKSPACE_BYTES", 4096)


def integers(*shape: int, dtype: torch.dtype = BF16, stride: int = 0) -> torch.Tensor:
    """Values of -2 to 2, exact in every type, in rows that are `stride` elements apart."""
    values = torch.randint(-2, 3, shape).to(dtype)
    if not stride:
        return values
    wide = torch.zeros(shape[0], stride).to(dtype)
    wide[:, : shape[1]] = values
    return wide[:, : shape[1]]


def poisoned(*shape: int, dtype: torch.dtype, stride: int = 0) -> torch.Tensor:
    wide = torch.full((shape[0], stride or shape[1]), float("nan")).to(dtype)
    return wide[:, : shape[1]]


def multiply(engine, a, b, out, add=None, scales=None, fast=False) -> torch.Tensor:
    return engine.matmul(Product(a, b, out, add, scales, fast))


def number(value: float) -> torch.Tensor:
    return torch.tensor([value])


def test_structures_have_the_sizes_of_the_header():
    """Printed by a C program from cublasLt.h 13.1 and 12.8: sizeof and offsetof."""
    assert ctypes.sizeof(cublaslt_library.Algorithm) == 64
    assert ctypes.sizeof(HeuristicResult) == 96
    fields = ("algo", "workspace_size", "state", "waves_count", "reserved")
    assert [getattr(HeuristicResult, field).offset for field in fields] == [0, 64, 72, 76, 80]


def test_prototypes_have_the_arguments_of_the_header():
    counts = {name: len(arguments) for name, arguments in PROTOTYPES.items()}
    assert counts["cublasLtMatmul"] == 16
    assert counts["cublasLtMatmulAlgoGetHeuristic"] == 10
    assert counts["cublasLtMatrixLayoutCreate"] == 5
    assert PROTOTYPES["cublasLtMatmul"][14] is ctypes.c_size_t
    assert PROTOTYPES["cublasLtMatrixLayoutCreate"][2:] == (
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_int64,
    )


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


def test_what_is_called_and_when(engine, library):
    a, b = integers(16, 16, dtype=E4M3), integers(32, 16, dtype=E4M3)
    scales = Scales(number(1.0), number(1.0))
    multiply(engine, a, b, torch.empty(16, 32), scales=scales)
    assert library.names() == [
        "MatmulDescCreate",
        *["MatmulDescSetAttribute"] * 3,  # transa, transb, fast accumulation
        "Create",
        *["MatrixLayoutCreate"] * 4,
        *["MatmulDescSetAttribute"] * 2,  # two scales
        "MatmulPreferenceCreate",
        *["MatmulPreferenceSetAttribute"] * 6,
        "MatmulAlgoGetHeuristic",
        "MatmulPreferenceDestroy",
        "Matmul",
    ]
    multiply(engine, a.clone(), b.clone(), torch.empty(16, 32), scales=scales)
    assert library.names() == ["Matmul"], "other matrices of the same kind"
    other = Scales(number(2.0), scales.b_scale_inv)
    out = multiply(engine, a, b, torch.empty(16, 32), scales=other)
    assert library.names() == ["MatmulDescSetAttribute", "Matmul"], "one scale moved"
    torch.testing.assert_close(out, 2 * (a.float() @ b.float().t()))


def test_kinds_of_products_are_kept_apart(engine, library):
    """Each of these needs descriptors or an algorithm of its own."""
    a, b = integers(16, 16, dtype=E4M3), integers(16, 16, dtype=E4M3)
    out, add = torch.zeros(16, 16), torch.zeros(16, 16)
    fp8, scale = poisoned(16, 16, dtype=E4M3), number(1.0)
    wide = torch.zeros(16, 32)
    kinds = [
        (a, b, out),
        (a, b, out, out),
        (a, b, out, add),
        (a, b, out, None, None, True),
        (a, b, out, None, Scales(scale, scale)),
        (a, b, wide[:, :16]),
        (a, b, fp8, None, Scales(scale, scale)),
        (a, b, fp8, None, Scales(scale, scale, scale)),
        (a, b, fp8, None, Scales(scale, scale, scale, number(0.0))),
        (a[:8], b, out[:8]),
        (a, b.view(torch.float8_e5m2), out),
    ]
    for kind in kinds:
        multiply(engine, *kind)
    assert library.names().count("MatmulAlgoGetHeuristic") == len(kinds)
    for kind in kinds:
        multiply(engine, *kind)
    assert "MatmulAlgoGetHeuristic" not in library.names()


def test_a_misaligned_matrix_has_an_algorithm_of_its_own(engine, library):
    memory = integers(1, 200)[0]
    b, out = integers(4, 8), torch.empty(4, 4)
    multiply(engine, memory[:32].view(4, 8), b, out)
    multiply(engine, memory[1:33].view(4, 8), b, out)
    set_values = [a for name, a in library.calls if name.endswith("PreferenceSetAttribute")]
    alignments = [a[2]._obj.value for a in set_values if a[1] in (5, 6, 7, 8)]
    assert alignments == [16] * 4 + [2] * 4


def test_each_stream_has_its_own_workspace(engine, library, cuda):
    a, b = integers(4, 4), integers(4, 4)
    used = []
    for cuda.address in (1, 2, 1):
        multiply(engine, a, b, torch.empty(4, 4))
        _, arguments = library.calls[-1]
        used.append((arguments[-1], arguments[-3]))
    assert [stream for stream, _ in used] == [1, 2, 1]
    assert used[0] == used[2]
    assert used[0][1] != used[1][1]


class TestTuning:
    @pytest.fixture
    def library(self) -> FakeLibrary:
        return FakeLibrary(proposals=3)

    @pytest.fixture(autouse=True)
    def times(self, cuda):
        cuda.times = [3.0, 1.0, 2.0]

    def last_algorithm(self, library) -> int:
        name, arguments = library.calls[-1]
        assert name == "cublasLtMatmul"
        return ctypes.c_uint64.from_address(arguments[12]).value - 100

    def test_the_fastest_is_kept(self, engine, library):
        a, b, out = integers(4, 8), integers(6, 8), integers(4, 6, dtype=FP32)
        expected = out + a.float() @ b.float().t()
        multiply(engine, a, b, out, out)
        torch.testing.assert_close(out, expected)  # added once: trials go elsewhere
        assert self.last_algorithm(library) == 1
        assert library.names().count("Matmul") == 4
        multiply(engine, a, b, out, out)
        assert self.last_algorithm(library) == 1
        assert library.names() == ["Matmul"]
        [row] = engine.report
        assert (row.m, row.n, row.k, row.layout) == (4, 6, 8, "TN")
        assert row.dtypes == "bfloat16 x bfloat16 + add -> float32"
        assert (row.first_ms, row.best_ms, row.index) == (3.0, 1.0, 1)
        assert row.times_ms == (3.0, 1.0, 2.0)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_trials_do_the_same_work(self, engine, library, in_place):
        out = torch.zeros(4, 6)
        add = out if in_place else torch.ones(4, 6)
        multiply(engine, integers(4, 8), integers(6, 8), out, add)
        runs = [arguments for name, arguments in library.calls if name == "cublasLtMatmul"]
        for run in runs[:-1]:
            assert run[10] != out.data_ptr()
            assert run[8] == (run[10] if in_place else add.data_ptr())
        assert runs[-1][10] == out.data_ptr()

    def test_an_algorithm_that_does_not_run_is_passed_over(self, engine, library):
        library.broken_algorithms = {1}
        multiply(engine, integers(4, 8), integers(6, 8), torch.empty(4, 6))
        assert self.last_algorithm(library) == 2
        assert engine.report[0].times_ms == (3.0, float("inf"), 2.0)

    def test_a_result_that_is_no_algorithm_is_passed_over(self, engine, library, cuda):
        library.bad_results = {0}
        cuda.times = [2.0, 1.0]
        multiply(engine, integers(4, 8), integers(6, 8), torch.empty(4, 6))
        assert self.last_algorithm(library) == 2

    def test_without_tuning_the_first_is_taken_and_tuned_later(self, engine, library):
        product = integers(4, 8), integers(6, 8), torch.empty(4, 6)
        with tuning(False):
            multiply(engine, *product)
            multiply(engine, *product)
        assert self.last_algorithm(library) == 0
        assert engine.report == []
        assert library.names().count("Matmul") == 2
        multiply(engine, *product)
        assert self.last_algorithm(library) == 1

    def test_nothing_is_timed_under_capture(self, engine, library, cuda):
        product = integers(4, 8), integers(6, 8), torch.empty(4, 6)
        cuda.capturing = True
        multiply(engine, *product)
        assert self.last_algorithm(library) == 0
        cuda.capturing = False
        multiply(engine, *product)
        assert self.last_algorithm(library) == 1

    def test_it_is_a_setting_too(self):
        tuning(False)
        assert not tuning.enabled
        with tuning(True):
            assert tuning.enabled
        assert not tuning.enabled
        tuning(True)


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


def test_the_loaded_library_is_found():
    maps = (
        "7f00-7f01 r--p 00000000 08:01 11 /site packages/nvidia/cu13/lib/libcublasLt.so.13\n"
        "7f01-7f02 r-xp 00000000 08:01 11 /site packages/nvidia/cu13/lib/libcublasLt.so.13\n"
        "7f02-7f03 r-xp 00000000 08:01 12 /site packages/nvidia/cu13/lib/libcublas.so.13\n"
        "7f03-7f04 rw-p 00000000 00:00 0 \n"
    )
    found = ["/site packages/nvidia/cu13/lib/libcublasLt.so.13"]
    assert cublaslt_library.paths_in(maps) == found
