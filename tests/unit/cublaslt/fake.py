"""A library that multiplies column-major on the CPU, in the place of libcublasLt, and its matrices.

The fake is written from the documentation, not from the binding: it knows descriptors, column-major
layouts, op(A) op(B), scales and amax, and checks every call against the C prototypes.  All values
are small integers, so that sums are exact and results can be compared bit by bit.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from litespark.ops import cublaslt
from litespark.ops.cublaslt import Cuda
from litespark.ops.cublaslt_library import PROTOTYPES
from litespark.ops.cublaslt_product import Product
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
