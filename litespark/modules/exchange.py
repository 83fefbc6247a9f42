"""How the tokens of a block travel between tensor-parallel ranks.

A block's input linear is column-parallel: every rank needs all tokens, and the gradient of its
input is a partial sum.  Its output linear is row-parallel: the output is a partial sum, and every
rank needs all of its gradient.  Under sequence parallelism a rank holds 1/size of the tokens
outside of the two linears, so that "needs all" is an all-gather and "partial sum" a reduce-scatter;
otherwise the first costs nothing and the second is an all-reduce.
Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Exchange:
    """Gather and reduce of token rows [m, ...] over the tensor-parallel group.

    Args:
        group: the tensor-parallel ranks.
        sequence_parallel: whether tokens are split over them outside of the linears.
    """

    def __init__(self, group: ProcessGroup, *, sequence_parallel: bool) -> None:
        self.group = group
        self.size = group.size()
        self.splits_tokens = sequence_parallel and self.size > 1

    def gather(self, rows_mk: Tensor) -> Tensor:
        """The rows of all ranks in order, [m * size, k]; the input itself where none is split."""
        return self.start_gather(rows_mk)()

    def start_gather(self, rows_mk: Tensor) -> Callable[[], Tensor]:
        """Start `gather`; the result is what the returned function returns, when it is there."""
        if not self.splits_tokens:
            return lambda: rows_mk
        # Collectives know no FP8: bytes travel.
        payload = rows_mk.view(torch.uint8) if rows_mk.element_size() == 1 else rows_mk
        payload = payload.contiguous()
        gathered = payload.new_empty((payload.size(0) * self.size, *payload.shape[1:]))
        work = dist.all_gather_into_tensor(gathered, payload, group=self.group, async_op=True)

        def finish() -> Tensor:
            assert work is not None, "started asynchronously"
            work.wait()
            return gathered.view(rows_mk.dtype)

        return finish

    def reduce(self, partial_mk: Tensor) -> Tensor:
        """The sum over ranks, of this rank's rows where they are split; may reuse the input."""
        return self.start_reduce(partial_mk)()

    def start_reduce(self, partial_mk: Tensor) -> Callable[[], Tensor]:
        """Start `reduce`; the result is what the returned function returns, when it is there."""
        if self.size == 1:
            return lambda: partial_mk
        if self.splits_tokens:
            own_mk = partial_mk.new_empty((partial_mk.size(0) // self.size, *partial_mk.shape[1:]))
            work = dist.reduce_scatter_tensor(
                own_mk, partial_mk.contiguous(), group=self.group, async_op=True
            )
        else:
            own_mk = partial_mk.contiguous()
            work = dist.all_reduce(own_mk, group=self.group, async_op=True)

        def finish() -> Tensor:
            assert work is not None, "started asynchronously"
            work.wait()
            return own_mk

        return finish
