"""This rank's part of a checkpoint: planned together, copied to the host, then written alone.

The step loop waits for `plan` and the copy only.  What is copied can be written while the
optimizer changes the originals in place, because nothing of the copy is shared with them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from litespark.checkpoint.integrity import ChecksumFile, FileRecord
from litespark.utils.files import fsync_path

FILES_PER_RANK = 2  # written side by side: one thread fills no fast disk


@dataclass(frozen=True)
class HostCopy:
    """What one rank has to write: items with their data in host memory, a list a file.

    `metadata` says where every tensor of all ranks lies; only the first rank has it, as it has
    the `common` values that belong to no tensor.
    """

    buckets: list[list[tuple[WriteItem, Tensor | io.BytesIO]]]
    metadata: Metadata | None
    common: dict[str, Any]
    num_bytes: int


class HostBuffers:
    """Host memory that is used again from save to save; on a GPU pinned, so that copies are fast.

    To allocate and touch it anew at each save would cost more than the copy.
    """

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def copy(self, key: Any, tensor: Tensor) -> Tensor:
        """Start to copy a tensor into the buffer of this key; `finish` waits for all of them."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def finish(self) -> None:
        """Wait until all copies are there."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()


def copy_to_host(state: dict[str, Any], buffers: HostBuffers) -> HostCopy:
    """Agree with all ranks on who writes what, and copy this rank's part; a collective call."""
    sharded: Any
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    is_first = dist.get_rank() == 0
    planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), is_coordinator=is_first)
    plan = planner.create_local_plan()
    plans: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(plan, plans)
    metadata = planner.create_global_plan(plans)[1] if plans is not None else None
    plan = planner.finish_plan(plan)
    buckets: list[list[tuple[WriteItem, Tensor | io.BytesIO]]] = [[] for _ in range(FILES_PER_RANK)]
    sizes = [0] * FILES_PER_RANK
    for item in sorted(plan.items, key=lambda item: -_num_bytes(item)):
        data = planner.resolve_data(item)
        if isinstance(data, Tensor):
            data = buffers.copy(item.index, data)
        lightest = sizes.index(min(sizes))
        buckets[lightest].append((item, data))
        sizes[lightest] += _num_bytes(item)
    buffers.finish()
    return HostCopy([bucket for bucket in buckets if bucket], metadata, common, sum(sizes))


def write_shards(copy: HostCopy, folder: Path) -> tuple[dict[str, FileRecord], list[WriteResult]]:
    """Write this rank's files into `folder` and force them to the disk.

    Returns the files' records by name, and where in them each item lies.

    Raises:
        OSError: the disk is full or gone.
    """
    rank = dist.get_rank()
    names = [f"__{rank}_{number}.distcp" for number in range(len(copy.buckets))]
    with ThreadPoolExecutor(FILES_PER_RANK, thread_name_prefix="checkpoint-file") as pool:
        paths = [folder / name for name in names]
        written = list(pool.map(_write_bucket, paths, copy.buckets))
    fsync_path(folder)
    records = {name: record for name, (record, _) in zip(names, written, strict=True)}
    return records, [result for _, results in written for result in results]


def _write_bucket(
    path: Path, bucket: Sequence[tuple[WriteItem, Tensor | io.BytesIO]]
) -> tuple[FileRecord, list[WriteResult]]:
    """Write items one after the other, in the format of torch's distributed checkpoint."""
    results = []
    with ChecksumFile(path) as file:
        for item, data in bucket:
            start = file.tell()
            if isinstance(data, Tensor):
                torch.save(data, file)  # type: ignore[arg-type] - needs no more than write()
            else:
                file.write(data.getbuffer())
            length = file.tell() - start
            place = _StorageInfo(path.name, start, length)
            results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
        return file.force(), results


def _num_bytes(item: WriteItem) -> int:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        return 0
    tensor = item.tensor_data
    sizes = tensor.chunk.sizes if tensor.chunk is not None else tensor.size
    return sizes.numel() * tensor.properties.dtype.itemsize
