"""`torch.cuda.synchronize()` after pipeline communication, in timers and in the checkpoint writer.

Without: pipeline parallelism fails in `pipeline_parallel/p2p_communication.py`, a checkpoint in
`dist_checkpointing/strategies/filesystem_async.py`, timers in `timers.py`.  CPU work is
synchronous, so waiting for the device is nothing.

Goes when: megatron-core guards these calls with `torch.cuda.is_available()`.
"""

from __future__ import annotations

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch


def _nothing(device: object = None) -> None:
    """There is no device to wait for."""


def _apply() -> Undo:
    import torch

    return replace_attributes((torch.cuda, "synchronize", _nothing))


PATCH = Patch(
    name="synchronize",
    symbols=("torch.cuda.synchronize",),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="pipeline communication, timers and checkpoints wait for the CUDA device",
    remove_when="megatron-core guards its synchronize calls",
    apply=_apply,
)
