"""Matrix products through NVIDIA's cuBLASLt.

    D = scale_D * (scale_A scale_B * op(A) op(B) + beta * C),   beta 0 or 1

torch reaches the same library, but its `_scaled_mm` can neither accumulate into an fp32 gradient
(a pass of its own over both costs 16 bytes an element of DRAM traffic where the epilogue's costs
8), nor add a residual matrix, nor report the largest value of an FP8 output, and it takes the first
algorithm that the library proposes.

Layout.  cuBLASLt is column-major, torch row-major: a row-major [r, c] matrix is, byte for byte, the
column-major [c, r] one.  So `out = a @ b^T` is asked for as out^T [n, m] = b [n, k] @ a^T [k, m]:
cuBLASLt's A is our b and its B our a (and the scales swap with them).  An operand that is a
transposed view (`x.t()`) is the same memory with the other `op`, so that all three products of a
linear layer y = x w^T are taken without a copy:

    forward          y [m, n] = matmul(x [m, k], w [n, k])                 "TN", as in BLAS
    input gradient   dx [m, k] = matmul(dy [m, n], w.t() [k, n])           "NN"
    weight gradient  dw [n, k] = matmul(dy.t() [n, m], x.t() [k, m])       "NT"

FP8 products exist on Hopper in "TN" only, both operands contiguous along k, which is why
`Fp8Matrix` keeps transposed copies.

Algorithms.  The library proposes up to 8, best guess first.  At the first call with a kind of
product (sizes, types, layouts, alignment, epilogue) all are timed on the operands at hand, into a
scratch output, and the fastest is kept; this waits for the GPU, once a kind.  Algorithms may sum in
another order, so choices are kept on disk, where later processes find them (`cublaslt_choices`);
`tuning` turns all of it off.  Partial sums of a product that is split along k are always kept in
fp32.

Source: cuBLAS documentation, 3.1.4.1 "Tensorwide Scaling" (what an epilogue computes).
"""

from __future__ import annotations

import ctypes
import functools
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops import cublaslt_library as lt
from litespark.ops.cublaslt_choices import (
    AlgorithmChoice,
    AlgorithmChoices,
    blas_layout_of,
    kind_of,
    types_of,
)
from litespark.ops.cublaslt_product import (
    Addresses,
    Product,
    Scales,
    alignment,
    find_problem,
    find_scales_problem,
    layout_of,
    operations,
)
from litespark.ops.formats import FP8_MAX
from litespark.utils.choice_cache import cache_path

__all__ = [
    "Scales",
    "TunedProduct",
    "is_available",
    "matmul",
    "supports",
    "tuned_report",
    "tuning",
]

WORKSPACE_BYTES = 64 << 20  # NVIDIA advises 32 MiB on Hopper; more lets more algorithms in
MAX_ALGORITHMS = 8
WARM_UPS, TIMED_RUNS = 2, 5

_factors = (ctypes.c_float * 2)(0.0, 1.0)  # beta and alpha; never freed, as addresses are passed
_ZERO = ctypes.addressof(_factors)
_ONE = _ZERO + ctypes.sizeof(ctypes.c_float)

_POINTER_ATTRIBUTES = (lt.DESC_A_SCALE, lt.DESC_B_SCALE, lt.DESC_D_SCALE, lt.DESC_AMAX_D)


@dataclass(frozen=True)
class TunedProduct:
    """One row of `tuned_report`: what was tuned and which of the proposed algorithms is used.

    `layout` is BLAS's ("TN": both operands contiguous along k); `times_ms` are medians in the
    library's order, infinite where an algorithm did not run, and `index` is the chosen one's.
    """

    m: int
    n: int
    k: int
    dtypes: str
    layout: str
    times_ms: tuple[float, ...]
    index: int

    @property
    def first_ms(self) -> float:
        """The time of the algorithm that the library proposes first."""
        return self.times_ms[0]

    @property
    def best_ms(self) -> float:
        """The time of the algorithm that is used."""
        return self.times_ms[self.index]


class Cuda:
    """What is asked of CUDA beside cuBLASLt; a test without a GPU puts its own in its place."""

    def stream(self, device: int) -> int:
        """The address of the device's current stream."""
        return torch.cuda.current_stream(device).cuda_stream

    def is_capturing(self) -> bool:
        """Whether the current stream's work is being captured into a graph."""
        return torch.cuda.is_current_stream_capturing()

    def median_milliseconds(self, launches: Sequence[Callable[[], int]]) -> list[float]:
        """Median time of each launch on the current stream; infinite for one that fails.

        The launches take turns, so that a clock that drifts does not favour the first.
        """
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in launches]
        failed = [False] * len(launches)
        for turn in range(WARM_UPS + TIMED_RUNS):
            for index, launch in enumerate(launches):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                failed[index] = failed[index] or launch() != lt.SUCCESS
                end.record()
                if turn >= WARM_UPS:
                    pairs[index].append((start, end))
        torch.cuda.current_stream().synchronize()
        times = [statistics.median(start.elapsed_time(end) for start, end in p) for p in pairs]
        return [math.inf if broken else ms for broken, ms in zip(failed, times, strict=True)]


class tuning:
    """Whether products choose their algorithm by timing (as they do at first) or take the first.

    Only who chooses by timing looks at the choices on disk.

    `tuning(False)` sets it until further notice, `with tuning(False):` for the block.  A product
    first met without tuning is tuned when it is next met with tuning.
    """

    enabled = True

    def __init__(self, enabled: bool) -> None:
        self._before = tuning.enabled
        tuning.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        tuning.enabled = self._before


class _StreamMemory:
    """What the kernels of one stream write beside their output; kept for the process's life."""

    def __init__(self, device: torch.device) -> None:
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.amax = torch.empty(1, dtype=torch.float32, device=device)
        self.workspace_address = self.workspace.data_ptr()  # a multiple of 512; 256 is asked for
        self.amax_address = self.amax.data_ptr()


@dataclass
class _Plan:
    """One kind of product: its descriptors, which are never freed, and its algorithm.

    `layouts` are those of A, B, C and D; `pointers` what the descriptor's scales and amax were last
    set to; `algorithm` an address inside `results`, 0 before one is chosen; `slower` the others, in
    the order to fall back to.
    """

    text: str
    handle: int
    operation: int
    layouts: tuple[int, int, int, int]
    beta: int
    alignment: int
    pointers: tuple[int, int, int, int] = (0, 0, 0, 0)
    results: Any = None
    algorithm: int = 0
    slower: list[int] = field(default_factory=list)
    tuned: bool = False


class Engine:
    """The state behind `matmul`: handles, workspaces and plans.

    `library` is libcublasLt with its prototypes; `choices` are those on disk, if any are kept.
    """

    def __init__(
        self, library: Any, cuda: Cuda | None = None, choices: AlgorithmChoices | None = None
    ) -> None:
        self.library = library
        self.report: list[TunedProduct] = []
        self._choices = choices or AlgorithmChoices(lambda: None, str)
        self._cuda = Cuda() if cuda is None else cuda
        self._handles: dict[int, int] = {}
        self._memory: dict[tuple[int, int], _StreamMemory] = {}
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._pointer = c_void_p()
        self._pointer_address = ctypes.addressof(self._pointer)
        # A descriptor's pointers, the launch that reads them and the use of the stream's scratch
        # belong together, and autograd runs backward passes in threads of its own.
        self._lock = threading.Lock()

    def matmul(self, product: Product) -> Tensor:
        """`matmul` on the current device."""
        scales, device = product.scales, product.a.get_device()
        stream = self._cuda.stream(device)
        addresses = product.addresses()
        key = product.key(addresses)
        with self._lock:
            memory = self._memory.get((device, stream))
            if memory is None:
                memory = self._memory[device, stream] = _StreamMemory(product.a.device)
            plan = self._plans.get(key)
            if plan is None:
                plan = self._describe(product, addresses)
            if scales is not None:
                self._point(plan, scales, memory)
            if not plan.tuned and (plan.algorithm == 0 or self._may_tune()):
                self._choose(plan, product, addresses, memory, stream)
                self._plans[key] = plan  # not before: a kind that fails is checked again next time
            status = self._launch(plan, plan.algorithm, addresses, memory, stream)
            while status == lt.NOT_SUPPORTED and plan.slower:
                # A proposal is no promise: some are refused when they are launched.
                plan.algorithm = plan.slower.pop(0)
                status = self._launch(plan, plan.algorithm, addresses, memory, stream)
            lt.check(self.library, "cublasLtMatmul", status, plan.text)
            if scales is not None and scales.out_amax is not None:
                torch.maximum(scales.out_amax, memory.amax, out=scales.out_amax)
        return product.out

    def _describe(self, product: Product, addresses: Addresses) -> _Plan:
        """Check the tensors and make the descriptors of their product, without an algorithm."""
        a, b, out, add, scales, fast = product
        text = product.text()
        problem = find_problem(a, b, out, add) or find_scales_problem(a, out, scales)
        if problem is not None:
            raise LitesparkError(f"cuBLASLt cannot compute {text}: {problem}")
        fp32 = lt.CUDA_TYPES[torch.float32]  # the type of alpha and beta
        operation = lt.create(self.library, "cublasLtMatmulDescCreate", text, lt.COMPUTE_32F, fp32)
        transa, transb = operations(a, b)
        attributes: list[tuple[int, Any]] = [
            (lt.DESC_TRANSA, c_int32(transa)),
            (lt.DESC_TRANSB, c_int32(transb)),
        ]
        if a.dtype in FP8_MAX:
            attributes.append((lt.DESC_FAST_ACCUM, c_int8(fast)))
        for attribute, value in attributes:
            self._set("cublasLtMatmulDescSetAttribute", text, operation, attribute, value)
        c_dtype = torch.bfloat16 if out.dtype in FP8_MAX else out.dtype
        return _Plan(
            text=text,
            handle=self._handle(a.get_device()),
            operation=operation,
            layouts=(
                self._layout(text, b, b.dtype),
                self._layout(text, a, a.dtype),
                self._layout(text, out if add is None else add, c_dtype),
                self._layout(text, out, out.dtype),
            ),
            beta=_ZERO if add is None else _ONE,
            alignment=alignment(addresses),
        )

    def _layout(self, text: str, matrix: Tensor, dtype: torch.dtype) -> int:
        rows, cols, ld, _ = layout_of(matrix)
        cuda_type = lt.CUDA_TYPES[dtype]
        name = "cublasLtMatrixLayoutCreate"
        return lt.create(self.library, name, text, cuda_type, rows, cols, ld)

    def _handle(self, device: int) -> int:
        if device not in self._handles:
            text = f"device {device}"
            self._handles[device] = lt.create(self.library, "cublasLtCreate", text)
        return self._handles[device]

    def _set(self, name: str, text: str, target: int, attribute: int, value: Any) -> None:
        lt.set_attribute(self.library, name, text, target, attribute, value)

    def _point(self, plan: _Plan, scales: Scales, memory: _StreamMemory) -> None:
        """Tell the descriptor where the scales and the amax are, if they moved."""
        pointers = (
            scales.b_scale_inv.data_ptr(),
            scales.a_scale_inv.data_ptr(),
            0 if scales.out_scale is None else scales.out_scale.data_ptr(),
            0 if scales.out_amax is None else memory.amax_address,
        )
        if pointers == plan.pointers:
            return
        if any(pointer % 16 for pointer in pointers):
            # The library then refuses every algorithm without saying why (seen with 13.1).
            raise LitesparkError(f"cuBLASLt needs scales at multiples of 16 bytes: {plan.text}")
        set_attribute = self.library.cublasLtMatmulDescSetAttribute
        for index, attribute in enumerate(_POINTER_ATTRIBUTES):
            if plan.pointers[index] != pointers[index]:
                self._pointer.value = pointers[index]  # its value is copied
                status = set_attribute(plan.operation, attribute, self._pointer_address, 8)
                lt.check(self.library, "cublasLtMatmulDescSetAttribute", status, plan.text)
        plan.pointers = pointers

    def _may_tune(self) -> bool:
        """Timing waits for the GPU, which a graph under capture forbids."""
        return tuning.enabled and not self._cuda.is_capturing()

    def _choose(
        self,
        plan: _Plan,
        product: Product,
        addresses: Addresses,
        memory: _StreamMemory,
        stream: int,
    ) -> None:
        """Settle on an algorithm: the fastest where they may be timed, else the first."""
        may_tune = self._may_tune()
        plan.results, algorithms = self._proposals(plan, MAX_ALGORITHMS if may_tune else 1)
        plan.algorithm, plan.tuned = algorithms[0], may_tune
        plan.slower = algorithms[1:]
        if len(algorithms) == 1:
            return
        choice = self._choices.choose(
            kind_of(product, plan.alignment),
            product.a.get_device(),
            len(algorithms),
            lambda: self._times(plan, algorithms, product.out, addresses, memory, stream),
        )
        if choice is None:
            return
        plan.algorithm, *plan.slower = [algorithms[index] for index in choice.ranking()]
        self.report.append(_row(product, choice))

    def _times(
        self,
        plan: _Plan,
        algorithms: list[int],
        out: Tensor,
        addresses: Addresses,
        memory: _StreamMemory,
        stream: int,
    ) -> list[float] | None:
        """Milliseconds of each algorithm; None where the GPU has no memory left to time them."""
        try:  # not the real output: a product that accumulates would add to it each time
            scratch = torch.empty_strided(
                out.shape, out.stride(), dtype=out.dtype, device=out.device
            )
        except torch.OutOfMemoryError:
            return None  # tuning is not worth failing a run that fits without
        a_address, b_address, c_address, d_address = addresses
        trial = scratch.data_ptr()
        c_address = trial if c_address == d_address else c_address
        trials = (a_address, b_address, c_address, trial)
        return self._cuda.median_milliseconds(
            [
                functools.partial(self._launch, plan, algorithm, trials, memory, stream)
                for algorithm in algorithms
            ]
        )

    def _proposals(self, plan: _Plan, count: int) -> tuple[Any, list[int]]:
        """The library's algorithms, best guess first: their array, and addresses inside it."""
        preference = lt.create(self.library, "cublasLtMatmulPreferenceCreate", plan.text)
        attributes: list[tuple[int, Any]] = [
            (lt.PREF_WORKSPACE, c_uint64(WORKSPACE_BYTES)),
            (lt.PREF_REDUCTION, c_uint32(lt.FP32_REDUCTION)),
            *((attribute, c_uint32(plan.alignment)) for attribute in lt.PREF_ALIGNMENTS),
        ]
        for attribute, value in attributes:
            name = "cublasLtMatmulPreferenceSetAttribute"
            self._set(name, plan.text, preference, attribute, value)
        results, returned = (lt.HeuristicResult * count)(), c_int(0)
        status = self.library.cublasLtMatmulAlgoGetHeuristic(
            plan.handle,
            plan.operation,
            *plan.layouts,
            preference,
            count,
            ctypes.byref(results),
            ctypes.byref(returned),
        )
        self.library.cublasLtMatmulPreferenceDestroy(preference)
        lt.check(self.library, "cublasLtMatmulAlgoGetHeuristic", status, plan.text)
        algorithms = [
            ctypes.addressof(results) + index * ctypes.sizeof(lt.HeuristicResult)
            for index in range(returned.value)
            if results[index].state == lt.SUCCESS
        ]
        if not algorithms:
            raise LitesparkError(f"cuBLASLt has no algorithm for {plan.text}")
        return results, algorithms

    def _launch(
        self,
        plan: _Plan,
        algorithm: int,
        addresses: Addresses,
        memory: _StreamMemory,
        stream: int,
    ) -> int:
        a_address, b_address, c_address, d_address = addresses
        a_layout, b_layout, c_layout, d_layout = plan.layouts
        return self.library.cublasLtMatmul(
            plan.handle,
            plan.operation,
            _ONE,
            a_address,
            a_layout,
            b_address,
            b_layout,
            plan.beta,
            c_address,
            c_layout,
            d_address,
            d_layout,
            algorithm,
            memory.workspace_address,
            WORKSPACE_BYTES,
            stream,
        )


def _row(product: Product, choice: AlgorithmChoice) -> TunedProduct:
    return TunedProduct(
        m=product.a.shape[0],
        n=product.b.shape[0],
        k=product.a.shape[1],
        dtypes=types_of(product),
        layout=blas_layout_of(product),
        times_ms=choice.times_ms,
        index=choice.index,
    )


def _machine_name(library: Any, device: int) -> str:
    """The GPU, and all else that decides what the library proposes and how fast it is."""
    versions = f"cublasLt {library.cublasLtGetVersion()}, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)}, {versions}, workspace {WORKSPACE_BYTES}"


@functools.cache
def _engine() -> Engine:
    library = lt.find_library()
    if library is None:
        raise LitesparkError("libcublasLt was not found; torch's CUDA builds bring it")
    path = functools.partial(cache_path, "cublaslt.json")
    machine = functools.partial(_machine_name, library)
    return Engine(library, choices=AlgorithmChoices(path, machine))


@functools.cache
def is_available() -> bool:
    """Whether there are a CUDA device and libcublasLt."""
    return torch.cuda.is_available() and lt.find_library() is not None


def supports(a_mk: Tensor, b_nk: Tensor, out_mn: Tensor, add_mn: Tensor | None = None) -> bool:
    """Whether `matmul` takes these matrices: shapes, types, layouts, alignment.

    Asks no device: FP8 also needs compute capability 8.9 or more.
    """
    return find_problem(a_mk, b_nk, out_mn, add_mn) is None


def matmul(
    a_mk: Tensor,
    b_nk: Tensor,
    out_mn: Tensor,
    *,
    add_mn: Tensor | None = None,
    scales: Scales | None = None,
    fast_accumulate: bool = False,
) -> Tensor:
    """`a @ b^T (+ add)` into `out`, which is returned; sums in fp32.

    On the current stream of the operands' device; records no gradient.

    Args:
        a_mk: bf16, E4M3 or E5M2.  Rows or columns contiguous (a transposed view will do); FP8 only
            rows, with k, n, row strides and addresses that are multiples of 16.
        b_nk: the same, but not E5M2 twice and not bf16 with FP8.
        out_mn: bf16, fp32 or, from FP8 operands, E4M3 or (if one of them is E5M2) E5M2; rows
            contiguous.  Must not overlap the operands.
        add_mn: added before rounding: `out` itself (accumulates in place), or a matrix elsewhere of
            out's type, bf16 where `out` is FP8.
        scales: of FP8 operands; without them 1.
        fast_accumulate: FP8 sums stay in the tensor core's short accumulator (about 14 bits)
            instead of moving to fp32 every 128 elements of k.  No effect on bf16.

    Raises:
        LitesparkError: `supports` would say no, the scales do not fit, or cuBLASLt failed.
    """
    if not a_mk.is_cuda:
        raise LitesparkError("cuBLASLt multiplies CUDA tensors only")
    product = Product(a_mk, b_nk, out_mn, add_mn, scales, fast_accumulate)
    device = a_mk.get_device()
    if device == torch.cuda.current_device():
        return _engine().matmul(product)
    with torch.cuda.device(device):
        return _engine().matmul(product)


def tuned_report() -> list[TunedProduct]:
    """What was tuned so far, in order; the times may be those of an earlier process."""
    return list(_engine().report) if is_available() else []
