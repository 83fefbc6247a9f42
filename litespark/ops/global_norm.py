"""The sum of squares of all gradients, in one pass.

    sum_i g_i^2     over every element of a list of tensors

Two stages, both in a fixed order, so that a run repeated has the same norm to the last bit:
programs add up the squares of 32768 elements each, in fp32 in a tree, and write one partial sum;
the program that finds itself the last to finish, by a counter, adds the partial sums in fp64.  No
value is added atomically.  4 bytes per element are read, and 1/32768 of that is written; a second
kernel for the second stage would cost a tenth of the time.

Gradients lie next to each other in megatron-core's buffers.  Tensors that do are read as one, so
that a few launches do instead of one per weight, most of which would be too small to fill the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig, runs_kernel, tl, triton

# `block_m` blocks of `block_n` elements a program.
DEFAULT = LaunchConfig(block_m=16, block_n=2048, num_warps=8)
_CHUNK = 1024  # partial sums that are added at a time
CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "sum_of_squares": (
        DEFAULT,
        LaunchConfig(block_m=4, block_n=2048, num_warps=4),
        LaunchConfig(block_m=8, block_n=1024, num_warps=4),
        LaunchConfig(block_m=8, block_n=2048, num_warps=4),
        LaunchConfig(block_m=8, block_n=2048, num_warps=8),
        LaunchConfig(block_m=4, block_n=4096, num_warps=8),
    )
}


def sum_of_squares_reference(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum in plain torch and fp64, as `sum_of_squares` describes it."""
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for tensor in tensors:
        total += tensor.double().square().sum()
    return total


@triton.jit(do_not_specialize=["first_partial", "all_partials"])
def _sum_of_squares_kernel(
    values_ptr,
    partials_ptr,
    finished_ptr,
    total_ptr,
    numel,  # of all gradients together: may exceed 32 bits, which the annotation `int` would mean
    first_partial: int,
    all_partials: int,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """The partial sums of one run, and their total by the last program of all runs."""
    program = tl.program_id(0).to(tl.int64)
    offsets_n = program * (BLOCKS * BLOCK) + tl.arange(0, BLOCK)
    squares_n = tl.zeros((BLOCK,), dtype=tl.float32)
    # Unrolled, so that all loads are under way before the first is needed.
    for index in tl.static_range(BLOCKS):  # pyright: ignore[reportGeneralTypeIssues]
        block_n = offsets_n + index * BLOCK
        values_n = tl.load(values_ptr + block_n, mask=block_n < numel, other=0.0)
        squares_n += values_n * values_n
    tl.store(partials_ptr + first_partial + program, tl.sum(squares_n, axis=0))
    tl.debug_barrier()  # the thread that counts need not be the one that stored
    finished = tl.atomic_add(finished_ptr, 1, sem="acq_rel")
    if finished == all_partials - 1:
        sums_c = tl.zeros((CHUNK,), dtype=tl.float64)
        for first in tl.range(0, all_partials, CHUNK):  # pyright: ignore[reportGeneralTypeIssues]
            at_c = first + tl.arange(0, CHUNK)
            # From L2, where the other programs' stores are; L1 is not coherent.
            partials_c = tl.load(
                partials_ptr + at_c, mask=at_c < all_partials, other=0.0, cache_modifier=".cg"
            )
            sums_c += partials_c.to(tl.float64)
        tl.store(total_ptr, tl.sum(sums_c, axis=0))


def sum_of_squares(
    tensors: Sequence[Tensor], device: torch.device, *, config: LaunchConfig | None = None
) -> Tensor:
    """Sum of the squares of all elements of `tensors`; fp64 [1] on `device`, without a host sync.

    `tensors` are fp32, contiguous, of any shapes, all on `device`; the list may be empty.  The
    result is infinite where a square exceeds fp32's range, as a gradient above 1.8e19 has it.

    Raises:
        LitesparkError: a tensor of another dtype, or that is not contiguous.
    """
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise LitesparkError(
                "the norm is computed of contiguous fp32 tensors; one is "
                f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    if not tensors or not runs_kernel(tensors[0]):
        return sum_of_squares_reference(tensors, device)
    config = config or DEFAULT
    runs = _joined(tensors)
    counts = [triton.cdiv(run.numel(), config.block_m * config.block_n) for run in runs]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=device)
    zeros = torch.zeros(2, dtype=torch.float64, device=device)  # one fill for both
    total, finished = zeros[:1], zeros[1:].view(torch.int32)
    first = 0
    for run, count in zip(runs, counts, strict=True):
        _sum_of_squares_kernel[(count,)](
            run,
            partials,
            finished,
            total,
            run.numel(),
            first,
            partials.numel(),
            BLOCKS=config.block_m,
            BLOCK=config.block_n,
            CHUNK=_CHUNK,
            num_warps=config.num_warps,  # pyright: ignore[reportCallIssue] - Triton's own
            num_stages=config.num_stages,  # pyright: ignore[reportCallIssue]
        )
        first += count
    return total


def _joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same elements as flat tensors, one for each run of neighbours in memory.

    Sorted within each allocation, and allocations by their first tensor in the list: addresses
    differ from run to run, and the order of the sum must not.
    """
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > 0:
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    runs: list[Tensor] = []
    for neighbours in by_storage.values():
        neighbours.sort(key=Tensor.storage_offset)
        first, length = neighbours[0], 0
        for tensor in neighbours:
            if tensor.storage_offset() != first.storage_offset() + length:
                runs.append(first.as_strided((length,), (1,)))
                first, length = tensor, 0
            length += tensor.numel()
        runs.append(first.as_strided((length,), (1,)))
    return runs
