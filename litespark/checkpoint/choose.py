"""Which checkpoint a run resumes from: the newest whole one, and all ranks agree on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from litespark.checkpoint.integrity import DamagedCheckpoint, describe, quick_faults, share_faults
from litespark.errors import UserError
from litespark.parallel.groups import gather_objects

logger = logging.getLogger("litespark.checkpoint")


def first_intact(candidates: Sequence[Path]) -> Path | None:
    """The first that looks whole without its tensors being read; None without candidates.

    Raises:
        UserError: there are candidates, and none is whole.
    """
    faults: dict[Path, list[str]] = {}
    for checkpoint in candidates:
        faults[checkpoint] = quick_faults(checkpoint)
        if not faults[checkpoint]:
            return checkpoint
    return _none_is_whole(faults)


def newest_whole(candidates: Sequence[Path], *, verify: bool) -> Path | None:
    """The first that is whole; all ranks call it together, and each reads its share of the files.

    A damaged one is named in the log, with the files and what is wrong with them.

    Raises:
        UserError: there are candidates, and none is whole; the same on every rank.
    """
    candidates = gather_objects([str(path) for path in candidates])[0]
    faults: dict[Path, list[str]] = {}
    for checkpoint in map(Path, candidates):
        found = quick_faults(checkpoint)
        if not found and verify:
            found = share_faults(checkpoint, dist.get_rank(), dist.get_world_size())
        shares = gather_objects(found)
        faults[checkpoint] = list(dict.fromkeys(fault for share in shares for fault in share))
        if not faults[checkpoint]:
            return checkpoint
        if dist.get_rank() == 0 and len(candidates) > 1:
            what = describe(faults[checkpoint])
            logger.error("checkpoint %s is damaged and skipped: %s", checkpoint.name, what)
    try:
        return _none_is_whole(faults)
    except UserError as error:
        error.on_every_rank = True
        raise


def _none_is_whole(faults: dict[Path, list[str]]) -> None:
    if not faults:
        return
    if len(faults) == 1:
        raise DamagedCheckpoint(*next(iter(faults.items())))
    said = "; ".join(describe(each[:1]) for each in faults.values())
    raise UserError(
        str(next(iter(faults)).parent),
        f"holds {len(faults)} checkpoints and each is damaged: {said}",
        "Restore one from a copy, or start anew in another run.output_dir.",
    )
