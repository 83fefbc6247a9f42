"""Where the time of a step goes: GPU kernels by family, and the time in which none runs.

torch's profiler notes start and length of every kernel.  Their sum, by family, says what the work
costs; the wall time that no kernel covers is idle, whatever the reason: launches that come too
slowly, a host that waits, a gap between dependent kernels.  Kernels that overlap (communication
beside computation) are each counted in full, and the surplus is stated, so that

    wall = sum of the families + idle - overlapped.

A kernel has nothing but its name to be recognised by.  The names are those of the libraries: cuBLAS
calls its Hopper products `nvjet_...`, cuDNN's attention is `cudnn_generated_..._sdpa_...` with
helpers in `cudnn::fusion::`, CuTe kernels carry the path of the Python function in one long name,
and a Triton kernel is called as its function.
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

PRODUCTS, ATTENTION, OPTIMIZER = "matrix products", "attention", "optimizer"
ELSE, IDLE = "everything else", "idle"
OTHER = "other"
PARTS = (PRODUCTS, ATTENTION, ELSE, OPTIMIZER, IDLE)

_TOP_KERNELS = 25
_MICROSECONDS = 1e6

# The first pattern that is found decides.  Litespark's own kernels whose names do not say what they
# belong to come first; a test holds them against `litespark/ops`.  Attention comes before the
# products because its CuTe kernels have "cutlass" in their names too; the families of our fused
# kernels come before "quantise" because most of them quantise on the way; the optimizer's norm
# before the model's.
_FAMILIES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (family, re.compile(pattern, re.IGNORECASE))
    for family, pattern in (
        (OPTIMIZER, r"^_sum_of_squares_kernel"),
        ("cross-entropy", r"^_(statistics|finish)_kernel"),
        ("communication", r"nccl|nvshmem|multimem|userbuffers"),
        ("memory set, copy", r"^mem(set|cpy)\b"),
        (ATTENTION, r"flash|fmha|sdpa|cudnn|attention|attn"),
        (PRODUCTS, r"nvjet|gemm|gemv|xmma|cublas|matmul|split_?k"),
        (OPTIMIZER, r"adam|multi_tensor|l2_?norm|lp_?norm|norm_?two|global_norm|clip"),
        ("cross-entropy", r"cross_?entropy|soft_?max|nll_loss|log_?sum_?exp"),
        ("rope", r"rope(?!r)|rotary"),
        ("swiglu", r"swiglu|silu|gated|sigmoid"),
        ("norm", r"rms_?norm|layer_?norm|normalization"),
        ("quantise", r"quanti[sz]e|(?<!broad)cast|transpose|amax|_scale_kernel|fp8|float8"),
        (PRODUCTS, r"cutlass"),
        ("memory set, copy", r"fill_?functor|copy_?kernel|batched_?copy|chunk_cat"),
    )
)


class Kernel(NamedTuple):
    """One kernel as it ran: microseconds on the profiler's clock."""

    name: str
    start_us: float
    end_us: float

    @property
    def duration_us(self) -> float:
        """How long it ran."""
        return self.end_us - self.start_us


def family_of(name: str) -> str:
    """The family of the kernel called `name`; `other` when no pattern knows it."""
    return next((family for family, pattern in _FAMILIES if pattern.search(name)), OTHER)


def covered_us(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one of the kernels ran."""
    covered, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_us):
        covered += max(0.0, kernel.end_us - max(kernel.start_us, reached))
        reached = max(reached, kernel.end_us)
    return covered


def break_down(kernels: Sequence[Kernel], wall_seconds: float, tokens: float) -> dict[str, Any]:
    """The breakdown of one step as a JSON object; times in microseconds per token.

    `parts` holds the five parts of `PARTS`, `everything_else` the families within the third,
    `top_kernels` the most expensive kernels by name.

    Args:
        kernels: all kernels of the step on one GPU.
        wall_seconds: from before the first launch until the GPU has finished.
        tokens: this GPU's share of the step's tokens.
    """
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.duration_us / tokens)
    families: dict[str, float] = defaultdict(float)
    for name, times in by_name.items():
        families[family_of(name)] += sum(times)
    busy = math.fsum(families.values())
    covered = covered_us(kernels) / tokens
    wall = wall_seconds * _MICROSECONDS / tokens
    parts = dict.fromkeys(PARTS, 0.0) | {IDLE: wall - covered}
    for part in (PRODUCTS, ATTENTION, OPTIMIZER):
        parts[part] = families.pop(part, 0.0)
    parts[ELSE] = math.fsum(families.values())
    dearest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_TOP_KERNELS]
    return {
        "wall_us_per_token": wall,
        "parts_us_per_token": parts,
        "everything_else_us_per_token": dict(sorted(families.items(), key=lambda item: -item[1])),
        "overlapped_us_per_token": busy - covered,
        "kernels": len(kernels),
        "top_kernels": [
            {
                "us_per_token": sum(times),
                "count": len(times),
                "family": family_of(name),
                "name": name,
            }
            for name, times in dearest
        ],
    }


def record_kernels(step: Callable[[], object]) -> tuple[list[Kernel], float]:
    """Run `step` once under torch's profiler; its kernels, and its wall time in seconds.

    Only kernel events are recorded, which costs the step about a microsecond a launch.
    """
    from torch.profiler import ProfilerActivity, profile

    def recording() -> Any:
        return profile(activities=[ProfilerActivity.CUDA])

    with recording():  # the first recording loads CUPTI, which is no part of a step
        torch.ones(1, device="cuda")
        torch.cuda.synchronize()
    with recording() as recorded:
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall_seconds = time.perf_counter() - started
    return kernels_of(recorded.events() or ()), wall_seconds


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """The kernels, memory sets and copies among the profiler's events.

    Ranges that a library names (`record_function`, NVTX) appear on the device's timeline too,
    around the kernels that they launched, and would count these twice.
    """
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
