"""`device="cuda"` written out in ten modules.

Without: the optimizer fails first (`optimizer/optimizer.py`), then the pipeline schedules, the
causal mask (`transformer/utils.py`) and the norms (`utils.py`).  In a fully parallel checkpoint
load one rank raises (`dist_checkpointing/exchange_utils.py`) while the others wait for ever.

Each of these modules gets its own view of `torch`, whose tensor factories make a "cuda" device the
CPU; `torch` itself stays as it is.  `ShardedTensor.init_data` receives its device as an argument
and is wrapped.

Goes when: megatron-core takes these devices from a function.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_patches.attributes import ModuleView, Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from torch import Tensor

MODULES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.utils",
    "megatron.core.transformer.utils",
    "megatron.core.tensor_parallel.data",
    "megatron.core.rerun_state_machine",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like", "ones_like")


def _on_cpu(device: Any) -> Any:
    return "cpu" if device is not None and str(device).startswith("cuda") else device


def _cpu_factory(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return factory(*args, device=_on_cpu(device), **kwargs)

    return make


def _apply() -> Undo:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    view = ModuleView(torch, **{name: _cpu_factory(getattr(torch, name)) for name in FACTORIES})
    original_init_data = ShardedTensor.init_data

    @functools.wraps(original_init_data)
    def init_data(self: ShardedTensor, device: Any, init_fn: Any = torch.empty) -> None:
        original_init_data(self, _on_cpu(device), init_fn)

    return replace_attributes(
        *((importlib.import_module(module), "torch", view) for module in MODULES),
        (ShardedTensor, "init_data", init_data),
    )


PATCH = Patch(
    name="cuda_literals",
    symbols=(
        *(f"{module}.torch" for module in MODULES),
        "megatron.core.dist_checkpointing.mapping.ShardedTensor.init_data",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why='ten modules allocate with device="cuda" written out',
    remove_when="megatron-core takes these devices from a function",
    apply=_apply,
)
