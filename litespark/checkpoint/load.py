"""Reads a checkpoint into the model and optimizer of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from litespark.checkpoint.folder import STATE
from litespark.checkpoint.run_state import RunState
from litespark.checkpoint.sharded import (
    bare_model,
    check_readable,
    load_sharded,
    model_state,
    run_tensors,
)


def load_checkpoint(
    checkpoint: Path, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer
) -> RunState:
    """Load model and optimizer; all ranks call it together.

    The fp32 masters come from the checkpoint: copying the model's bf16 weights over them, as is
    right when weights are loaded alone, would lose their lower bits.

    Raises:
        UserError: the checkpoint cannot be read or does not fit.
    """
    loaded = load_sharded(run_tensors(chunks, optimizer, is_loading=True), checkpoint / STATE)
    _load_chunks(chunks, loaded)
    _load_optimizer(optimizer, loaded["optimizer"])
    return RunState.read(checkpoint)


def _load_chunks(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        bare_model(chunk).load_state_dict(loaded[f"model{number}"])


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the moments, the masters and the step count, and keep this optimizer's own options.

    Options such as betas are the configuration's.  A checkpoint also lacks those that only the
    other Adam has: Transformer Engine's has more of them than torch's, and counts steps in int.
    """
    options = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update({key: own[key] for key in own if key not in ("params", "step")})
        if "step" in group:
            group["step"] = int(group["step"])


def load_weights(checkpoint: Path, chunks: Sequence[torch.nn.Module]) -> RunState:
    """Load the model alone, for export and generation; all ranks call it together.

    Raises:
        UserError: the checkpoint cannot be read or does not fit.
    """
    check_readable(checkpoint)
    loaded = load_sharded(model_state(chunks), checkpoint / STATE)
    _load_chunks(chunks, loaded)
    return RunState.read(checkpoint)
