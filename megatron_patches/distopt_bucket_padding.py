"""`fully_reshardable` checkpoints of the distributed optimizer with several buckets.

Without: the checkpoint is corrupt, weights included, and only a log line mentions zeros.
`sharded_param_state_fully_reshardable` (`optimizer/distrib_optimizer.py`) concatenates the buckets
*without* the padding at their ends and then cuts parameters out at offsets that *count* the
padding. With one bucket, or bucket ends that need no padding, the two agree; otherwise everything
after the first padded end is shifted.  While the function runs, the buffers show offsets without
padding.

Goes when: upstream counts the padding in both places or in none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch import Tensor

# parameter -> (start, end, bucket), in elements of the buffer
_IndexMap = Mapping["Tensor", tuple[int, int, int]]


def _index_map_without_padding(buffer: _ParamAndGradBuffer) -> _IndexMap:
    padding_before: dict[int, int] = {}
    unpadded_so_far = 0
    for bucket in buffer.buckets:
        padding_before[bucket.bucket_id] = bucket.offset - unpadded_so_far
        unpadded_so_far += bucket.numel_unpadded
    return {
        param: (start - padding_before[bucket_id], end - padding_before[bucket_id], bucket_id)
        for param, (start, end, bucket_id) in buffer.param_index_map.items()
    }


def _apply() -> Undo:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def sharded_param_state(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
        undo = replace_attributes(
            *(
                (buffer, "param_index_map", _index_map_without_padding(buffer))
                for buffer in self.buffers
            )
        )
        try:
            return original(self, *args, **kwargs)
        finally:
            undo()

    return replace_attributes(
        (DistributedOptimizer, "sharded_param_state_fully_reshardable", sharded_param_state)
    )


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
PATCH = Patch(
    name="distopt_bucket_padding",
    symbols=(f"{_OPTIMIZER}.sharded_param_state_fully_reshardable",),
    versions=">=0.16.1,<0.17",
    condition=Condition.ALWAYS,
    why="fully_reshardable checkpoints are written shifted when bucket ends are padded",
    remove_when="upstream cuts the state at the offsets it was concatenated with",
    apply=_apply,
)
