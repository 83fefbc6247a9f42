"""Writes a checkpoint: all ranks their shards, the first rank the rest, then the name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.serialization import save
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from litespark.checkpoint.folder import CONFIG, STATE, checkpoint_name, publish_checkpoint
from litespark.checkpoint.run_state import FILE_NAME, RunState
from litespark.checkpoint.sharded import run_tensors
from litespark.errors import LitesparkError
from litespark.utils.files import fsync_path, write_text_atomically


def save_checkpoint(
    checkpoints: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    state: RunState,
    config_yaml: str,
) -> Path:
    """Write the checkpoint of `state.step` below `checkpoints`; all ranks call it together.

    Everything goes to a temporary folder, is forced to disk, and only then renamed: whoever is
    killed at whatever moment leaves the older checkpoints and no incomplete one.  Every rank's
    writer forces its shards itself; the first rank forces the small files that it alone writes.

    Raises:
        LitesparkError: the disk is full or gone; nothing of the new checkpoint stays.
    """
    temporary = checkpoints / f".{checkpoint_name(state.step)}.writing"
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / STATE).mkdir(parents=True)
    dist.barrier()
    try:
        save(run_tensors(chunks, optimizer, is_loading=False), str(temporary / STATE))
    except (CheckpointException, OSError) as error:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise _SaveFailed(f"{temporary} could not be written ({_reason(error)})") from error
    final = checkpoints / checkpoint_name(state.step)
    dist.barrier()
    if is_first:
        write_text_atomically(temporary / CONFIG, config_yaml)
        write_text_atomically(temporary / FILE_NAME, state.to_json())
        for path in (*(temporary / STATE).iterdir(), temporary / STATE, temporary):
            fsync_path(path)
        final = publish_checkpoint(temporary, checkpoints, state.step)
    dist.barrier()
    return final


class _SaveFailed(LitesparkError):
    """A save that failed on some rank, of which torch's writer tells all."""

    on_every_rank = True


def _reason(error: BaseException) -> str:
    """The first line of the first rank's fault."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
