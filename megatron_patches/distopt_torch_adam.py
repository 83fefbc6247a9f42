"""Checkpoints of the distributed optimizer around `torch.optim.AdamW`.

Without: a resumed run is wrong or does not start (`optimizer/distrib_optimizer.py`).  megatron-core
expects a fused Adam, which counts steps per group; torch's AdamW keeps a `step` per parameter:

* `state_dict` of an optimizer that has not stepped yet fails (it looks for one common step in an
  empty state), so no checkpoint can be loaded into a fresh optimizer;
* `load_state_dict` gives all parameters the *same* step tensor, which AdamW then increments once
  per parameter: the run resumes with a wrong bias correction and no error;
* loading a `fully_reshardable` state looks for a saved `step` per parameter, which is not written,
  and copies in place into a leaf that requires a gradient.

Goes when: megatron-core keeps a step per parameter for torch optimizers.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch import Tensor
    from torch.optim import Optimizer


def _ensure_state(optimizer: Optimizer) -> None:
    """Give parameters that AdamW has not stepped yet the state it would start from."""
    import torch

    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state.get(param):
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _apply() -> Undo:
    import torch
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return replace_attributes()  # apex brings a fused Adam even without Transformer Engine
    original_state_dict, original_load = cls.state_dict, cls.load_state_dict
    original_get = cls._get_main_param_and_optimizer_states

    @functools.wraps(original_state_dict)
    def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
        _ensure_state(self.optimizer)
        return original_state_dict(self)

    @functools.wraps(original_load)
    def load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(original_get)
    def get_states(self: DistributedOptimizer, model_param: Tensor) -> dict[str, Tensor]:
        # The step travels in the parameter groups.
        states = original_get(self, model_param)
        return {name: tensor for name, tensor in states.items() if name != "step"}

    @functools.wraps(cls._set_main_param_and_optimizer_states)
    def set_states(
        self: DistributedOptimizer, model_param: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        with torch.no_grad():
            for name, target in get_states(self, model_param).items():
                target.copy_(tensors[name])

    return replace_attributes(
        (cls, "state_dict", state_dict),
        (cls, "load_state_dict", load_state_dict),
        (cls, "_get_main_param_and_optimizer_states", get_states),
        (cls, "_set_main_param_and_optimizer_states", set_states),
    )


_CLASS = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
PATCH = Patch(
    name="distopt_torch_adam",
    symbols=(
        f"{_CLASS}.state_dict",
        f"{_CLASS}.load_state_dict",
        f"{_CLASS}._get_main_param_and_optimizer_states",
        f"{_CLASS}._set_main_param_and_optimizer_states",
        "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.NO_TE,
    why="with torch's AdamW a resumed distributed optimizer counts steps wrongly",
    remove_when="the distributed optimizer keeps a step per parameter for torch optimizers",
    apply=_apply,
)
