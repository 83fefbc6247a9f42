"""Configurations that megatron-core accepts and then computes something else with.

Without: wrong or unexpected numbers, no error:

* fp8 / fp4 without Transformer Engine trains in the plain precision (`fp8_utils.py`);
* two pipeline stages with virtual stages and batched p2p, the default, swap the tensors of the two
  neighbours, which are the same rank (`pipeline_parallel/p2p_communication.py`): loss off by 0.24;
* `enable_autocast` on a CPU switches itself off (`pipeline_parallel/schedules.py` asks for CUDA);
* `cross_entropy_loss_fusion` rounds the gradient of fp32 logits to bf16
  (`fusions/fused_cross_entropy.py`);
* a persistent checkpoint worker on a CPU shares the parameters instead of copying them, so a
  snapshot contains later updates (`dist_checkpointing/strategies/async_utils.py`).

Each of them raises a `UserError` instead, when the configuration or the queue is made.

Goes when: upstream refuses or repairs each of them; the list shrinks one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from litespark.errors import UserError, raise_user_errors
from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch, active_device_type, has_transformer_engine

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.transformer import TransformerConfig


def _faults(config: TransformerConfig) -> Iterator[UserError]:
    import torch

    for name, value in (("fp8", config.fp8), ("fp4", config.fp4)):
        if value and not has_transformer_engine():
            yield UserError(
                f"{name} = {value}",
                "needs Transformer Engine; without it the run would silently not use it",
                f"Install transformer-engine, or set {name} to null.",
            )
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual and config.pipeline_model_parallel_size == 2 and config.batch_p2p_comm:
        yield UserError(
            f"batch_p2p_comm = true with 2 pipeline stages and {virtual} virtual stages",
            "tensors for the next and the previous stage would be swapped",
            "Set overlap_p2p_comm to true and batch_p2p_comm to false.",
        )
    if config.enable_autocast and active_device_type() == "cpu":
        yield UserError(
            "enable_autocast = true",
            "has no effect on a CPU",
            "Set params_dtype and bf16 instead.",
        )
    if config.cross_entropy_loss_fusion and config.params_dtype == torch.float32:
        yield UserError(
            "cross_entropy_loss_fusion = true with params_dtype = float32",
            "the gradient of the logits would be rounded to bf16",
            "Set cross_entropy_loss_fusion to false.",
        )


def _apply() -> Undo:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
    from megatron.core.transformer import TransformerConfig

    original_post_init = TransformerConfig.__post_init__
    original_queue_init = AsyncCallsQueue.__init__

    @functools.wraps(original_post_init)
    def post_init(self: TransformerConfig) -> None:
        original_post_init(self)
        raise_user_errors(list(_faults(self)))

    @functools.wraps(original_queue_init)
    def queue_init(self: AsyncCallsQueue, persistent: bool = False) -> None:
        if persistent and active_device_type() == "cpu":
            raise UserError(
                "persistent = true",
                "a persistent checkpoint worker on a CPU shares the parameters, so later updates"
                " would leak into the checkpoint",
                "Use AsyncCallsQueue(persistent=False).",
            )
        original_queue_init(self, persistent)

    return replace_attributes(
        (TransformerConfig, "__post_init__", post_init),
        (AsyncCallsQueue, "__init__", queue_init),
    )


PATCH = Patch(
    name="refuse_silent_faults",
    symbols=(
        "megatron.core.transformer.TransformerConfig.__post_init__",
        "megatron.core.dist_checkpointing.strategies.async_utils.AsyncCallsQueue.__init__",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.ALWAYS,
    why="five configurations give wrong numbers without an error",
    remove_when="upstream refuses or repairs each of them",
    apply=_apply,
)
