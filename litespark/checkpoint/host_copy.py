"""This rank's part of a checkpoint: planned together, copied to the host, then written alone.

The step loop waits for `plan` and the copy only.  What is copied can be written while the
optimizer changes the originals in place, because nothing of the copy is shared with them.
"""

from __future__ import annotations

import io
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from litespark.checkpoint.integrity import ChecksumFile, FileRecord
from litespark.utils.files import fsync_path

logger = logging.getLogger("litespark.checkpoint")

FILES_PER_RANK = 2  # written side by side: one thread fills no fast disk
_ALIGNMENT_BYTES = 64
_PIN_BYTES = 256 << 20  # pinned in one call, during which other calls of the driver wait
_PINNING_THREADS = 4  # a rank; there are as many ranks as GPUs beside it
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all threads and GPUs of the process


@dataclass(frozen=True)
class CopySeconds:
    """What training waited for: the ranks' agreement, host memory (the first time), the copy."""

    plan: float
    memory: float
    transfer: float


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
    seconds: CopySeconds


class HostBuffers:
    """Host memory that is used again from save to save; on a GPU pinned, so that copies are fast.

    To allocate, touch and pin it anew at each save would cost more than the copy.  It is one block:
    the framework's own pinned memory is rounded up to powers of two for each tensor and is touched
    by one thread, which took 35 s for 32 GB.  What the last save copied is overwritten by the next,
    which therefore must not begin before that is written.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._pinned: list[Tensor] = []
        self._used_bytes = 0
        self._preparation: threading.Thread | None = None
        # Not at the end of the process, when CUDA may be gone already.
        weakref.finalize(self, _unpin, self._pinned).atexit = False

    def prepare(self, size_bytes: int) -> None:
        """Take and pin memory in the background, so that the first save need not wait for it.

        That is 7 s for 32 GB.  If it fails, `reserve` tries again, and raises.
        """
        device = torch.cuda.current_device()  # which a new thread does not inherit

        def take() -> None:
            with suppress(RuntimeError, MemoryError):
                self._take(size_bytes, device)

        self._preparation = threading.Thread(target=take, name="checkpoint-memory", daemon=True)
        self._preparation.start()

    def reserve(self, size_bytes: int, *, pinned: bool) -> None:
        """Have room for a save of so many bytes, and forget what the last one copied."""
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None
        self._used_bytes = 0
        if size_bytes > self._block.numel():
            self.release()
            self._take(size_bytes, torch.cuda.current_device() if pinned else None)

    def copy(self, tensor: Tensor) -> Tensor:
        """Start to copy a tensor into the next free bytes; `finish` waits for all copies.

        The copy has a storage of its own size within the block: torch.save writes whole storages.
        No single transfer crosses from one pinned part into the next.
        """
        source = tensor.detach().reshape(-1).view(torch.uint8)
        start, end = self._used_bytes, self._used_bytes + source.numel()
        self._used_bytes += padded(source.numel())
        first = start
        while first < end:
            stop = min(end, (first // _PIN_BYTES + 1) * _PIN_BYTES)
            part = source[first - start : stop - start]
            self._block[first:stop].copy_(part, non_blocking=True)
            first = stop
        storage: Any = self._block.untyped_storage()[start:end]
        copied: Any = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(storage, 0, tensor.shape)

    def finish(self) -> None:
        """Wait until all copies are there."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give the memory back, as soon as no copy is in it."""
        _unpin(self._pinned)
        self._block = torch.empty(0, dtype=torch.uint8)

    def _take(self, size_bytes: int, device: int | None) -> None:
        """Take a block, and for a GPU pin it: fix its pages, so that the GPU writes into them."""
        block = torch.empty(size_bytes, dtype=torch.uint8)
        if device is not None:
            self._pin(block.split(_PIN_BYTES), device)
        self._block = block

    def _pin(self, parts: Sequence[Tensor], device: int) -> None:
        with ThreadPoolExecutor(
            _PINNING_THREADS, initializer=torch.cuda.set_device, initargs=(device,)
        ) as pool:
            is_pinned = pool.map(_pin, parts)
            self._pinned += [part for part, done in zip(parts, is_pinned, strict=True) if done]
        if len(self._pinned) < len(parts):
            logger.warning(
                "only %d of %d parts of the host memory for checkpoints could be pinned: training "
                "waits longer for each copy",
                *(len(self._pinned), len(parts)),
            )


def padded(size_bytes: int) -> int:
    """Bytes that a tensor takes in the buffers: any dtype may begin where it ends."""
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def own_bytes(state: dict[str, Any]) -> int:
    """Bytes that this rank will copy for a save of such a state; no collective call."""
    sharded, _ = save_preprocess(state, validate_access_integrity=False)
    shards = [each for each in nested_values(sharded) if isinstance(each, ShardedTensor)]
    return sum(
        padded(_size_bytes(shard.data))
        for shard in shards
        if shard.data is not None and is_main_replica(shard.replica_id)
    )


def _pin(part: Tensor) -> bool:
    part.zero_()  # the system gives it its pages here, in several threads
    cudart = _cudart()
    error = cudart.cudaHostRegister(part.data_ptr(), part.numel(), _PORTABLE)
    return error == cudart.cudaError.success


def _unpin(parts: list[Tensor]) -> None:
    while parts:
        _cudart().cudaHostUnregister(parts.pop().data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()


def copy_to_host(state: dict[str, Any], buffers: HostBuffers) -> HostCopy:
    """Agree with all ranks on who writes what, and copy this rank's part; a collective call."""
    times = [time.perf_counter()]
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
    resolved = [(item, planner.resolve_data(item)) for item in plan.items]
    tensors = [data for _, data in resolved if isinstance(data, Tensor)]
    times.append(time.perf_counter())
    buffers.reserve(
        sum(padded(_size_bytes(data)) for data in tensors),
        pinned=any(data.is_cuda for data in tensors),
    )
    times.append(time.perf_counter())
    buckets: list[list[tuple[WriteItem, Tensor | io.BytesIO]]] = [[] for _ in range(FILES_PER_RANK)]
    sizes = [0] * FILES_PER_RANK
    for item, data in sorted(resolved, key=lambda each: -_size_bytes(each[1])):
        lightest = sizes.index(min(sizes))
        sizes[lightest] += _size_bytes(data)
        copied = buffers.copy(data) if isinstance(data, Tensor) else data
        buckets[lightest].append((item, copied))
    buffers.finish()
    times.append(time.perf_counter())
    seconds = CopySeconds(*(end - start for start, end in pairwise(times)))
    return HostCopy([bucket for bucket in buckets if bucket], metadata, common, sum(sizes), seconds)


def write_shards(copy: HostCopy, folder: Path) -> tuple[dict[str, FileRecord], list[WriteResult]]:
    """Write this rank's files into `folder` and force them to the disk.

    Returns the files' records by name, and where in them each item lies.

    Raises:
        OSError: the disk is full or gone.
    """
    rank = dist.get_rank()
    names = [f"__{rank}_{number}.distcp" for number in range(len(copy.buckets))]
    with (
        _without_crc32(),
        ThreadPoolExecutor(FILES_PER_RANK, thread_name_prefix="checkpoint-file") as pool,
    ):
        paths = [folder / name for name in names]
        written = list(pool.map(_write_bucket, paths, copy.buckets))
    fsync_path(folder)
    records = {name: record for name, (record, _) in zip(names, written, strict=True)}
    return records, [result for _, results in written for result in results]


@contextmanager
def _without_crc32() -> Iterator[None]:
    """torch.save's own checksum is five times slower than XXH3-128, and no reader looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


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


def _size_bytes(data: Tensor | io.BytesIO) -> int:
    if isinstance(data, Tensor):
        return data.numel() * data.itemsize
    return data.getbuffer().nbytes
