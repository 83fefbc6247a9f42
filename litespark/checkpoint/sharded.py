"""The run's tensors as megatron-core's sharded state, which loads at any layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load, load_common_state_dict
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from litespark.checkpoint.folder import STATE
from litespark.errors import UserError


def bare_model(chunk: torch.nn.Module) -> Any:
    """The model inside DDP's and the half-precision wrapper.

    DDP prefixes the keys of its sharded state with `module.` but loads without the prefix, so
    state is always exchanged with the model itself.
    """
    while hasattr(chunk, "module") and not hasattr(chunk, "decoder"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def sharding_metadata() -> dict[str, Any]:
    """How to shard: every optimizer state as a tensor of its parameter's shape.

    Of megatron-core 0.16's formats only this one loads at other tensor and pipeline degrees.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state of this rank's model chunks, one entry a chunk."""
    metadata = sharding_metadata()
    return {
        f"model{number}": bare_model(chunk).sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(chunks)
    }


def run_tensors(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    """Sharded state of model and optimizer."""
    state = model_state(chunks)
    # The optimizer's keys follow from the model's, which it must not alter: a state of its own.
    state["optimizer"] = optimizer.sharded_state_dict(
        model_state(chunks), is_loading=is_loading, metadata=sharding_metadata()
    )
    return state


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read the tensors that `state` describes.

    Raises:
        UserError: the folder cannot be read, or lacks tensors, or holds others.
    """
    with _reporting(folder):
        return load(state, str(folder), strict="raise_unexpected")  # type: ignore[return-value]


def check_readable(checkpoint: Path) -> None:
    """Read the small files that say what a checkpoint holds, before all ranks load it together.

    Raises:
        UserError: one of them is missing or damaged.
    """
    folder = checkpoint / STATE
    for name, read in (
        ("metadata.json", lambda: json.loads((folder / "metadata.json").read_text())),
        ("common.pt", lambda: load_common_state_dict(str(folder))),
        (".metadata", lambda: FileSystemReader(str(folder)).read_metadata()),
    ):
        try:
            read()
        except UserError:
            raise
        except (Exception, CheckpointingException) as error:
            raise UserError(
                str(folder / name),
                f"is missing or damaged ({type(error).__name__}: {error})",
                "Take another checkpoint: run.resume=PATH.",
            ) from error


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """What a damaged or foreign folder makes megatron-core and torch raise.

    Both their exceptions derive from BaseException and slip past `except Exception`.
    """
    try:
        yield
    except (CheckpointingException, CheckpointException, OSError) as error:
        reason: BaseException = error
        if isinstance(error, CheckpointException):
            reason = next(iter(error.failures.values()))[0]
        raise UserError(
            str(folder),
            f"cannot be loaded into this model ({type(reason).__name__}: {reason})",
            "Take another checkpoint, or the configuration this one was written with.",
        ) from error
