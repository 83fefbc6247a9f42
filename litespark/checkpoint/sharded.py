"""The run's tensors as megatron-core's sharded state, which loads at any layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import load, load_common_state_dict
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from litespark.checkpoint.folder import STATE
from litespark.checkpoint.integrity import is_inside
from litespark.checkpoint.optimizer_state import MASTER, optimizer_key, optimizer_tensors
from litespark.errors import UserError
from litespark.fp8.primary import primary_spec


def bare_model(chunk: torch.nn.Module) -> Any:
    """The model inside DDP's and the half-precision wrapper.

    DDP prefixes the keys of its sharded state with `module.` but loads without the prefix, so
    state is always exchanged with the model itself.
    """
    while hasattr(chunk, "module") and not hasattr(chunk, "decoder"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def sharding_metadata() -> dict[str, Any]:
    """What megatron-core's modules want to know to describe their parts."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state of this rank's model chunks, one entry a chunk; to load weights into.

    In place of weights that exist in FP8 alone stand BF16 tensors, which are `pending` until the
    optimizer's `reload_model_params` makes masters of them.
    """
    state = _parameters(chunks)
    for chunk, entries in zip(chunks, state.values(), strict=True):
        for name, entry in entries.items():
            if _is_in_fp8(entry):
                entries[name] = _with_data_of(entry, torch.bfloat16)
                pending = bare_model(chunk).policy.primary.pending
                pending[entry.data] = entries[name].data
    return state


def run_tensors(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    stored: set[str] | None = None,
) -> dict[str, Any]:
    """Sharded state of model and optimizer; `stored`: keys of the checkpoint to load, if any.

    What is loaded from a checkpoint with fp32 masters into fp32 weights is the masters.  From one
    without, written in fp32, its weights are loaded as fp32 tensors in place of other weights.
    """
    state = _parameters(chunks)
    shards = optimizer_tensors(state, optimizer, stored)
    if stored is not None:
        dict_list_map_inplace(lambda entry: _as_stored(entry, stored), state)
    for chunk in state.values():
        for name in [name for name, entry in chunk.items() if _is_in_fp8(entry)]:
            del chunk[name]  # stored from its master, and made of it
    state["optimizer"] = dict(enumerate(shards))
    return state


def _parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The same with the parameters as they are."""
    metadata = sharding_metadata()
    return {
        f"model{number}": bare_model(chunk).sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(chunks)
    }


def _is_in_fp8(entry: Any) -> bool:
    is_weight = isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    return is_weight and entry.data is not None and primary_spec(entry.data) is not None


def _with_data_of(entry: Any, dtype: torch.dtype) -> Any:
    """The entry with a new tensor of another dtype in the parameter's place."""
    data = torch.zeros_like(entry.data, dtype=dtype)
    return replace(entry, data=data, **({"dtype": dtype} if hasattr(entry, "dtype") else {}))


def _as_stored(entry: Any, stored: set[str]) -> Any:
    if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)) or entry.data is None:
        return entry
    master = optimizer_key(MASTER, entry.key)
    if entry.data.dtype != torch.float32:
        return entry if master in stored else _with_data_of(entry, torch.float32)
    return replace(entry, key=master) if master in stored else entry


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read the tensors that `state` describes.

    Raises:
        UserError: the folder cannot be read, or lacks tensors, or holds others.
    """
    with _reporting(folder):
        return load(state, str(folder), strict="raise_unexpected")  # type: ignore[return-value]


def requested_keys(state: dict[str, Any]) -> set[str]:
    """Keys of the tensors that a state describes."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {entry.key for entry in nested_values(state) if isinstance(entry, kinds)}


def stored_keys(folder: Path) -> set[str]:
    """Keys of the tensors in a checkpoint.

    Raises:
        UserError: it cannot be read.
    """
    with _reporting(folder):
        metadata = FileSystemReader(str(folder)).read_metadata()
    tensors = metadata.state_dict_metadata.items()
    return {key for key, kind in tensors if isinstance(kind, TensorStorageMetadata)}


def check_readable(checkpoint: Path) -> None:
    """Read the small files that say what a checkpoint holds, before all ranks load it together.

    Raises:
        UserError: one of them is missing or damaged.
    """
    folder = checkpoint / STATE
    for name, read in (
        ("metadata.json", lambda: json.loads((folder / "metadata.json").read_text())),
        ("common.pt", lambda: load_common_state_dict(str(folder))),
        (".metadata", lambda: check_places(FileSystemReader(str(folder)).read_metadata())),
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


def check_places(metadata: Metadata) -> None:
    """Refuse an index that names files outside its folder.

    Raises:
        ValueError: it does.
    """
    for index, place in (metadata.storage_data or {}).items():
        if not is_inside(place.relative_path):
            raise ValueError(f"{index.fqn} lies outside, in {place.relative_path!r}")


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
