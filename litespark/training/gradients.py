"""What happens to the gradients of a step between its last backward pass and the optimizer.

megatron-core reduces them over the ranks that hold the same weights.  Its division by the number of
tokens asks the device for that number, so that the host waits for the whole backward pass; here the
device divides, which also lets the passes be recorded (`step_graph.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


def finalize_gradients(
    chunks: list[DistributedDataParallel],
    num_tokens: Tensor | None = None,
    *,
    pg_collection: ProcessGroupCollection,
    **options: Any,
) -> None:
    """Reduce the gradients over the ranks and divide them by the global batch's number of tokens.

    megatron-core's `finalize_model_grads`, whose arguments these are.  `num_tokens`, integer [], is
    right on the last pipeline stage; gradients of a batch without tokens, which are 0, stay.
    """
    finalize_model_grads(list(chunks), None, pg_collection=pg_collection, **options)
    if num_tokens is None:
        return
    stages: Any = pg_collection.pp
    dist.broadcast(num_tokens, src=dist.get_global_rank(stages, stages.size() - 1), group=stages)
    dist.all_reduce(num_tokens, group=pg_collection.dp_cp)
    scaling = torch.where(num_tokens > 0, 1.0 / num_tokens.clamp(min=1), 1.0)
    for chunk in chunks:
        chunk.scale_gradients(scaling)  # type: ignore[arg-type] - it multiplies by it
