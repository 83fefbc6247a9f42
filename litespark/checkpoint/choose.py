"""Which checkpoint a run resumes from: the newest whole one, and all ranks agree on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from litespark.checkpoint.integrity import (
    describe,
    quick_faults,
    refuse_if_none_is_whole,
    share_faults,
)
from litespark.errors import UserError
from litespark.parallel.groups import gather_objects

logger = logging.getLogger("litespark.checkpoint")


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
        return refuse_if_none_is_whole(faults)
    except UserError as error:
        error.on_every_rank = True
        raise
