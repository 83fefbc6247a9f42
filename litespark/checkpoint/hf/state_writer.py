"""Writes the tensors of a checkpoint one block after the other, without a process group.

The files are torch's distributed checkpoint, as training writes them: blocks, each as torch.save
makes it, one after the other, and an index (`.metadata`) that says where each lies.  Which block
goes into which file is settled before the first is written, so that a file that is complete can be
kept when the work goes on after a kill.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from litespark.checkpoint.hf.shards import groups_by_size
from litespark.checkpoint.hf.staging import Staging
from litespark.checkpoint.hf.table import Entry
from litespark.checkpoint.integrity import ChecksumFile, FileRecord, record_of, write_file
from litespark.utils.files import fsync_path

MAX_FILE_BYTES = 4 << 30
MAX_BLOCK_BYTES = 256 << 20
_EXTRA = "__1_0.distcp"


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of one stored tensor, or of one layer of it."""

    entry: Entry
    layer: int | None
    start: int
    stop: int
    row_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the block as it is stored, a layer axis of 1 included."""
        lead = () if self.layer is None else (1,)
        return (*lead, self.stop - self.start, *self.row_shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where it begins in the stored tensor."""
        lead = () if self.layer is None else (self.layer,)
        return (*lead, self.start, *(0 for _ in self.row_shape))


def blocks_of(
    entry: Entry, layers: Iterable[int | None], shape: tuple[int, ...], itemsize: int
) -> Iterable[Block]:
    """A stored tensor in blocks of at most `MAX_BLOCK_BYTES`, layer by layer."""
    row_bytes = math.prod(shape[1:]) * itemsize
    at_once = max(1, MAX_BLOCK_BYTES // row_bytes)
    for layer in layers:
        for start in range(0, shape[0], at_once):
            yield Block(entry, layer, start, min(start + at_once, shape[0]), shape[1:])


def write_state(
    staging: Staging,
    folder: str,
    blocks: Sequence[Block],
    dtype: torch.dtype,
    read: Callable[[Block, Tensor], None],
    on_bytes: Callable[[int], None],
) -> dict[str, FileRecord]:
    """Write all blocks and their index; returns the files' records by their path in the checkpoint.

    Args:
        staging: the folder that is written.
        folder: the path in it of the checkpoint's `state`.
        blocks: of all tensors, in the order in which they are read.
        dtype: format of the values.
        read: fills a tensor with a block's values.
        on_bytes: told how many bytes of tensors were written.

    Raises:
        OSError: the disk is full.
    """
    places: dict[MetadataIndex, _StorageInfo] = {}
    records: dict[str, FileRecord] = {}
    for number, group in enumerate(groups_by_size(blocks, dtype, MAX_FILE_BYTES)):
        name = f"__0_{number}.distcp"
        path = staging.folder / folder / name
        if name not in staging.done or not path.is_file():
            path.unlink(missing_ok=True)
            record, lengths = _write_file(path, group, dtype, read, on_bytes)
            staging.record(name, {"record": asdict(record), "lengths": lengths})
        else:
            on_bytes(sum(math.prod(block.shape) for block in group) * dtype.itemsize)
        records[name] = FileRecord(**staging.done[name]["record"])
        end = 0
        for block, length in zip(group, staging.done[name]["lengths"], strict=True):
            index = MetadataIndex(block.entry.key, torch.Size(block.offsets))
            places[index] = _StorageInfo(name, end, length)
            end += length
    return records | _write_index(staging.folder / folder, blocks, dtype, places)


def _write_file(
    path: Path,
    blocks: Sequence[Block],
    dtype: torch.dtype,
    read: Callable[[Block, Tensor], None],
    on_bytes: Callable[[int], None],
) -> tuple[FileRecord, list[int]]:
    lengths = []
    with ChecksumFile(path) as file:
        for block in blocks:
            value = torch.empty(block.shape, dtype=dtype)
            read(block, value if block.layer is None else value[0])
            start = file.tell()
            torch.save(value, file)  # type: ignore[arg-type] - needs no more than write()
            lengths.append(file.tell() - start)
            on_bytes(value.nbytes)
        return file.force(), lengths


def _write_index(
    folder: Path,
    blocks: Sequence[Block],
    dtype: torch.dtype,
    places: dict[MetadataIndex, _StorageInfo],
) -> dict[str, FileRecord]:
    """The files beside the tensors: where these lie, and what megatron-core wants to be there."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for block in blocks:
        chunk = ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.shape))
        chunks.setdefault(block.entry.key, []).append(chunk)
    tensors: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), _whole(mine), mine)
        for key, mine in chunks.items()
    }
    nothing = _saved([None])
    for key, num_layers in _linears(tensors):
        for layer in range(num_layers):
            extra = f"{key}._extra_state/shard_{layer}_{num_layers}"
            tensors[extra] = BytesStorageMetadata()
            places[MetadataIndex(extra)] = _StorageInfo(_EXTRA, 0, len(nothing))
    index = pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=places))
    contents = {".metadata": index, "common.pt": _saved({}), _EXTRA: nothing}
    records = {}
    for name, content in contents.items():
        (folder / name).unlink(missing_ok=True)
        records[name] = write_file(folder / name, content)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    fsync_path(folder / "metadata.json")
    records["metadata.json"] = record_of(folder / "metadata.json")
    fsync_path(folder)
    return records


def _linears(tensors: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Names of the layers' linear modules, which megatron-core gives an extra state, and its count.

    Nothing is in it, for every linear of every layer, so all share the same few bytes.
    """
    return [
        (key.removesuffix(".weight"), tensor.size[0])
        for key, tensor in tensors.items()
        if key.endswith(".weight") and len(tensor.size) == 3
    ]


def _saved(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _whole(chunks: Sequence[ChunkStorageMetadata]) -> torch.Size:
    """Size of the tensor that the chunks make up."""
    ends = [map(sum, zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in chunks]
    return torch.Size(map(max, zip(*ends, strict=True)))
