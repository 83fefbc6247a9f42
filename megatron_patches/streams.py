"""CUDA streams and events around overlapped communication.

Without: DDP with more than one distributed optimizer instance and overlap fails in
`distributed/distributed_data_parallel.py` and `distributed/param_and_grad_buffer.py`.  On a CPU
there is one order of execution; streams and events that do nothing keep to it.

Goes when: megatron-core uses `torch.Stream`, which knows the CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch


class _InOrder:
    """Stands for a stream or an event where everything already happens in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> _InOrder:
        return self

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _apply() -> Undo:
    import torch

    the_stream = _InOrder()

    def stream_of(device: object = None) -> _InOrder:
        return the_stream

    def use_stream(stream: object) -> AbstractContextManager[None]:
        return nullcontext()

    def record_stream(self: Any, stream: object) -> None:
        pass

    return replace_attributes(
        (torch.cuda, "Stream", _InOrder),
        (torch.cuda, "Event", _InOrder),
        (torch.cuda, "current_stream", stream_of),
        (torch.cuda, "default_stream", stream_of),
        (torch.cuda, "stream", use_stream),
        (torch.Tensor, "record_stream", record_stream),
    )


PATCH = Patch(
    name="streams",
    symbols=(
        "torch.cuda.Stream",
        "torch.cuda.Event",
        "torch.cuda.current_stream",
        "torch.cuda.default_stream",
        "torch.cuda.stream",
        "torch.Tensor.record_stream",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="overlap with several distributed optimizer instances makes CUDA streams",
    remove_when="megatron-core uses torch.Stream",
    apply=_apply,
)
