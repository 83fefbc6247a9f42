"""Writes safetensors files of bounded size, block of rows by block of rows.

The header comes first in the format, and says where each tensor lies.  Shapes and dtype are known
before any tensor is read, so all headers are known from the start, and memory holds a block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from litespark.checkpoint.hf.safetensors_file import DTYPE_NAMES
from litespark.checkpoint.hf.weights import INDEX, WEIGHTS
from litespark.errors import LitesparkError, UserError
from litespark.utils.files import HashingFile, write_text_atomically

MAX_SHARD_BYTES = 4 << 30
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is to be written: its name, shape, and where its rows come from."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class PlannedFile:
    """A file that is to be written, with its tensors in order."""

    name: str
    tensors: tuple[PlannedTensor, ...]


class Shaped(Protocol):
    """What has a shape."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of its dimensions."""
        ...


ShapedT = TypeVar("ShapedT", bound=Shaped)


def groups_by_size(
    tensors: Iterable[ShapedT], dtype: torch.dtype, max_bytes: int
) -> list[list[ShapedT]]:
    """Cut a row of tensors into groups of at most `max_bytes`; a larger one is its own group."""
    groups: list[list[ShapedT]] = [[]]
    size_bytes = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor.shape) * dtype.itemsize
        if groups[-1] and size_bytes + num_bytes > max_bytes:
            groups.append([])
            size_bytes = 0
        groups[-1].append(tensor)
        size_bytes += num_bytes
    return groups


def plan_files(
    tensors: Iterable[PlannedTensor], dtype: torch.dtype, max_bytes: int
) -> list[PlannedFile]:
    """Distribute tensors over files; a tensor larger than `max_bytes` gets a file of its own."""
    groups = groups_by_size(tensors, dtype, max_bytes)
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = [WEIGHTS] if count == 1 else names
    return [PlannedFile(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_index(folder: Path, files: Sequence[PlannedFile], dtype: torch.dtype) -> None:
    """Write which tensor is in which of several files."""
    tensors = [(tensor, file.name) for file in files for tensor in file.tensors]
    total = sum(math.prod(tensor.shape) * dtype.itemsize for tensor, _ in tensors)
    weight_map = {tensor.name: name for tensor, name in tensors}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text_atomically(folder / INDEX, json.dumps(content, indent=2) + "\n")


def write_file(
    path: Path, file: PlannedFile, dtype: torch.dtype, on_bytes: Callable[[int], None]
) -> str:
    """Write one file and force it to the disk; returns its SHA-256.

    Args:
        path: where; must not exist.
        file: its tensors.
        dtype: format of the values.
        on_bytes: told how many bytes of tensors were written.

    Raises:
        UserError: a value does not fit `dtype`.
        OSError: the disk is full.
    """
    output = HashingFile(path)
    try:
        output.write(_header(file, dtype))
        for tensor in file.tensors:
            num_bytes = 0
            for block in tensor.blocks():
                for rows in _in_bounded_rows(block):
                    values = _as_bytes(convert(tensor.name, rows, dtype))
                    output.write(values)
                    num_bytes += values.nbytes
                    on_bytes(values.nbytes)
            if num_bytes != math.prod(tensor.shape) * dtype.itemsize:
                raise LitesparkError(f"{tensor.name} gave {num_bytes} bytes, not {tensor.shape}")
        return output.close_durably()
    except BaseException:
        output.discard()
        raise


def convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in another format.

    Raises:
        UserError: a value does not fit: float16 ends at 65504, far below the other formats.
    """
    converted = tensor.to(dtype).contiguous()
    if dtype is torch.float16 and bool((converted.isinf() & tensor.isfinite()).any()):
        raise UserError(
            f"dtype float16: {name}",
            f"holds {tensor.abs().max().item():g}, and float16 ends at 65504",
            "Export as bfloat16 or float32.",
        )
    return converted


def _header(file: PlannedFile, dtype: torch.dtype) -> bytes:
    # transformers refuses a file that does not say which framework wrote it.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in file.tensors:
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _in_bounded_rows(block: Tensor) -> Iterable[Tensor]:
    row_bytes = max(1, block[0].numel() * block.element_size() if len(block) else 1)
    return block.split(max(1, _BLOCK_BYTES // row_bytes))


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()
