"""`torch.cuda.current_device()` as the place for new tensors.

Without: the first DDP buffer fails with "Torch not compiled with CUDA enabled"
(`distributed/param_and_grad_buffer.py`), and so do linear layers, pipeline communication, timers
and the checkpoint writers.  megatron-core writes `device=torch.cuda.current_device()` in about
seventy places.  The function answers with the CPU device instead of an index.

Goes when: megatron-core asks one device function that knows the CPU.
"""

from __future__ import annotations

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch


def _apply() -> Undo:
    import torch

    cpu = torch.device("cpu")
    return replace_attributes((torch.cuda, "current_device", lambda: cpu))


PATCH = Patch(
    name="current_device",
    symbols=("torch.cuda.current_device",),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="buffers are allocated on torch.cuda.current_device()",
    remove_when="megatron-core takes the device from one function that knows the CPU",
    apply=_apply,
)
