"""Where an op runs: its Triton kernel on CUDA tensors, its torch reference elsewhere.

The reference is the specification.  On a CPU it is also what runs, so that the fused blocks, their
parallelism and FP8 can be debugged on a laptop.  Tests run the kernels themselves on a CPU, through
Triton's interpreter, inside `kernels_on_cpu()`.

Modules with kernels take `triton` and `tl` from here: where Triton is not installed the kernels
can be defined, and only launching one is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from litespark.errors import MissingExtraError

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:

        class _Kernel:
            def __getitem__(self, grid: Any) -> Any:
                raise MissingExtraError("triton", "gpu", "fused kernels")

        class _Absent:
            """Lets modules with kernels be imported without Triton."""

            constexpr = int

            @staticmethod
            def jit(function: Any = None, **options: Any) -> Any:
                return _Kernel() if function is not None else lambda function: _Kernel()

        triton = tl = _Absent()

__all__ = ["INTERPRETED", "LaunchConfig", "kernels_on_cpu", "runs_kernel", "tl", "triton"]

# Read by Triton when a kernel is defined; for the few things that its interpreter lacks.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is cut and launched.

    `block_m` rows and `block_n` columns a tile; `num_warps` and `num_stages` as in Triton.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


_on_cpu = False


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Within the block CPU tensors too go through the kernels; needs TRITON_INTERPRET=1."""
    global _on_cpu
    _on_cpu, before = True, _on_cpu
    try:
        yield
    finally:
        _on_cpu = before


def runs_kernel(tensor: Tensor) -> bool:
    """Whether an op on `tensor` launches its kernel."""
    return tensor.is_cuda or _on_cpu
