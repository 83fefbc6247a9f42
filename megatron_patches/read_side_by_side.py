"""A rank reads its part of a checkpoint with one thread.

Without: loading is slower than the disk.  `FileSystemReader.read_data` takes one tensor after the
other: it reads into fresh memory, whose pages the kernel fills at 1 to 2 GB/s, then copies to the
parameter, and the disk idles meanwhile.  Here a few threads take a contiguous share of the bytes
each.  What is read, and by which calls, stays as it is.

Goes when: torch's reader takes a number of threads, as its writer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
    from torch.futures import Future

THREADS = 4  # a rank; there are as many ranks as GPUs beside it


def shares_of(items: Sequence[ReadItem], places: Mapping[Any, Any]) -> list[list[ReadItem]]:
    """Split what is to be read into at most `THREADS` parts of about equal bytes.

    Each is contiguous on disk, and together they are all items, each once.

    Args:
        items: what to read.
        places: for each item's `storage_index` its file, offset and length there.
    """

    def place(item: ReadItem) -> tuple[str, int]:
        info = places[item.storage_index]
        return info.relative_path, info.offset

    # A place that several items lie in is read for each of them.
    bound_bytes = sum(places[item.storage_index].length for item in items) / THREADS
    shares: list[list[ReadItem]] = [[]]
    filled_bytes = 0
    for item in sorted(items, key=place):
        if filled_bytes >= bound_bytes * len(shares) and len(shares) < THREADS:
            shares.append([])
        shares[-1].append(item)
        filled_bytes += places[item.storage_index].length
    return shares


def _apply() -> Undo:
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
        CachedMetadataFileSystemReader,
    )
    from torch.futures import Future

    class SideBySideReader(CachedMetadataFileSystemReader):
        def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
            shares = shares_of(plan.items, self.storage_data)
            read = super().read_data
            with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
                parts = [pool.submit(read, replace(plan, items=share), planner) for share in shares]
            for part in parts:
                part.result()
            done: Future[None] = Future()
            done.set_result(None)
            return done

    return replace_attributes((torch_strategy, "CachedMetadataFileSystemReader", SideBySideReader))


_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
PATCH = Patch(
    name="read_side_by_side",
    symbols=(
        f"{_STRATEGIES}.torch.CachedMetadataFileSystemReader",
        f"{_STRATEGIES}.torch._get_filesystem_reader",
        "torch.distributed.checkpoint.filesystem.FileSystemReader.read_data",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.ALWAYS,
    why="a rank would read its part of a checkpoint with one thread, slower than the disk",
    remove_when="torch's FileSystemReader takes a number of threads",
    apply=_apply,
)
