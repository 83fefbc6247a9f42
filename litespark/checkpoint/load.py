"""Reads a checkpoint into the model and optimizer of any layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from litespark.checkpoint.folder import STATE, random_states_file
from litespark.checkpoint.optimizer_state import (
    MASTER,
    optimizer_key,
    owned_masters,
    set_optimizer_step,
)
from litespark.checkpoint.run_state import RunState
from litespark.checkpoint.sharded import (
    bare_model,
    check_readable,
    load_sharded,
    model_state,
    requested_keys,
    run_tensors,
    stored_keys,
)
from litespark.errors import UserError
from litespark.fp8.primary import primary_spec
from litespark.modules.low_rank import is_adapter
from litespark.parallel.groups import gather_objects
from litespark.parallel.layout import RankLayout
from litespark.parallel.rng import fit_this_device, seed_anew, set_random_states


def load_checkpoint(
    checkpoint: Path, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer
) -> RunState:
    """Load model and optimizer; all ranks call it together.

    The fp32 masters come from the checkpoint: copying the model's bf16 weights over them, as is
    right when weights are loaded alone, would lose their lower bits.  The optimizer's options,
    such as betas, are the configuration's.

    Raises:
        UserError: the checkpoint cannot be read or does not fit; the same on every rank.
    """
    state = RunState.read(checkpoint)
    stored = stored_keys(checkpoint / STATE)
    wanted = run_tensors(chunks, optimizer, stored)
    _refuse_leftovers(checkpoint, wanted, stored)
    loaded = load_sharded(wanted, checkpoint / STATE)
    _load_chunks(chunks, loaded)
    _fill_masters(chunks, optimizer, loaded)
    set_optimizer_step(optimizer, state.optimizer_step)
    return state


def _refuse_leftovers(checkpoint: Path, wanted: dict[str, Any], stored: set[str]) -> None:
    """Refuse to load only a part of what a checkpoint holds, or less than this run needs."""
    requested = {key for keys in gather_objects(requested_keys(wanted)) for key in keys}
    lacking = requested - stored
    # fp32 weights are read from the masters, which leaves the weights in half precision over.
    over = {key for key in stored - requested if optimizer_key(MASTER, key) not in requested}
    if not lacking and not over:
        return
    parts = [
        f"{what} {', '.join(sorted(keys)[:5])}{' and others' if len(keys) > 5 else ''}"
        for what, keys in (("lacks", lacking), ("also holds", over))
        if keys
    ]
    raise UserError(
        str(checkpoint),
        f"does not fit this model: it {' and '.join(parts)}",
        "Take the configuration it was written with.",
    )


def _load_chunks(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        model = bare_model(chunk)
        in_fp8 = {  # which stay until they are written from their masters
            name: parameter
            for name, parameter in model.named_parameters()
            if primary_spec(parameter) is not None
        }
        model.load_state_dict({**loaded[f"model{number}"], **in_fp8})


@torch.no_grad()
def _fill_masters(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, loaded: dict[str, Any]
) -> None:
    """Masters where the checkpoint has none, as one written in fp32: its weights, unrounded."""
    values = {}
    for number, chunk in enumerate(chunks):
        for name, parameter in bare_model(chunk).named_parameters():
            value = loaded[f"model{number}"].get(name)
            if value is not None and value.dtype == torch.float32 != parameter.dtype:
                values[parameter] = value
    for parameter, master, start, stop in owned_masters(optimizer):
        if parameter in values:
            master.copy_(values[parameter].view(-1)[start:stop].view(master.shape))


def load_random_states(checkpoint: Path, state: RunState, layout: RankLayout) -> str | None:
    """Put this rank's random generators back to where they were; why that was not possible, if so.

    At another layout no rank has a predecessor, and the generators of a GPU and of a CPU have
    nothing in common; then all are seeded anew, with numbers that the run has not drawn yet.

    Raises:
        UserError: the file is not what was written.
    """
    if asdict(layout) != state.layout:
        seed_anew(state.seed, state.step)
        return f"the layout was {RankLayout(**state.layout).describe()}"
    path = checkpoint / random_states_file(dist.get_rank())
    try:
        states = json.loads(path.read_text(encoding="utf-8"))
        if not fit_this_device(states):
            seed_anew(state.seed, state.step)
            return "the device was of another kind"
        set_random_states(states)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            str(path), f"is not what was written ({error})", "Take another checkpoint."
        ) from None
    return None


def _refuse_unwanted_adapters(checkpoint: Path, wanted: dict[str, Any], stored: set[str]) -> None:
    """Refuse to leave out trained adapters without a word."""
    if any(map(is_adapter, stored)) and not any(map(is_adapter, requested_keys(wanted))):
        raise UserError(
            str(checkpoint),
            "holds low-rank adapters, and this run has none",
            "Start from its export (litespark export), which merges them, or set lora as it was.",
        )


def load_weights(checkpoint: Path, chunks: Sequence[torch.nn.Module]) -> RunState:
    """Load the model alone, for export and generation; all ranks call it together.

    An optimizer that there is has to be told (`reload_model_params`).

    Raises:
        UserError: the checkpoint cannot be read or does not fit.
    """
    check_readable(checkpoint)
    wanted, new_adapters = model_state(chunks), {}
    stored = stored_keys(checkpoint / STATE)
    _refuse_unwanted_adapters(checkpoint, wanted, stored)
    for name, state in wanted.items():
        # Adapters that begin in this run keep the values that they begin with.
        new = [key for key in state if is_adapter(key) and state[key].key not in stored]
        new_adapters[name] = {key: state.pop(key).data for key in new}
    loaded = load_sharded(wanted, checkpoint / STATE)
    for name, values in new_adapters.items():
        loaded[name].update(values)
    _load_chunks(chunks, loaded)
    return RunState.read(checkpoint)
