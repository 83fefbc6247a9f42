"""Reading a module's weights without calling the module.

With `overlap_param_gather` megatron-core's DDP gathers updated weights during the forward pass, and
waits for a module's own in a hook that runs before its `forward`.  A block that reads the weights
of modules which it never calls must run those hooks itself, or it computes with the weights of the
step before, without an error.
"""

from __future__ import annotations

from typing import Any


def run_forward_pre_hooks(*modules: Any) -> None:
    """Run what is registered to run before each module's forward."""
    for module in modules:
        for hook in tuple(module._forward_pre_hooks.values()):
            hook(module, ())
