"""Pipeline outputs that are freed while they are still being sent.

Without: wrong numbers, no error.  With `deallocate_pipeline_outputs` and `overlap_p2p_comm` the
schedule gives `out.data` away (`pipeline_parallel/schedules.py`, `deallocate_output_tensor`) right
after starting the send.  CUDA runs both on streams, in order; gloo reads the memory in a thread of
its own, later, when it may hold something else (the loss was off by 0.04 to 0.07, another amount
in each run).  The combination keeps the outputs.

Goes when: the schedule waits for the send before it frees the output.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig

_LOGGER = logging.getLogger("litespark.patches")


def _apply() -> Undo:
    from megatron.core.model_parallel_config import ModelParallelConfig

    original = ModelParallelConfig.__post_init__

    @functools.wraps(original)
    def post_init(self: ModelParallelConfig) -> None:
        original(self)
        if self.deallocate_pipeline_outputs and self.overlap_p2p_comm:
            self.deallocate_pipeline_outputs = False
            _LOGGER.info("deallocate_pipeline_outputs is off: gloo still sends the outputs")

    return replace_attributes((ModelParallelConfig, "__post_init__", post_init))


PATCH = Patch(
    name="keep_pipeline_outputs",
    symbols=(
        "megatron.core.model_parallel_config.ModelParallelConfig.__post_init__",
        "megatron.core.pipeline_parallel.schedules.deallocate_output_tensor",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="with overlapped p2p, outputs are freed while gloo sends them: wrong numbers",
    remove_when="the schedule waits for the send before it frees the output",
    apply=_apply,
)
