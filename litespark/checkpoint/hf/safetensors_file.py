"""One safetensors file, read row by row: 8 bytes of length, a JSON header, the tensors' bytes.

The library's reader maps the file into memory, where every page that was touched stays counted as
this process's; and it gives whole tensors.  A model may be larger than this machine's memory, so
here rows are read straight into the place they are wanted in.  Of the header nothing is believed:
each tensor's shape, dtype and place are checked against each other and against the file's size
before anything is read (the format: https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litespark.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_BLOCK_BYTES = 32 << 20
_DAMAGED = "It is damaged or made up: fetch it again."


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in which file; shape and dtype as its header says."""

    path: Path
    start_byte: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_rows(self, start: int, out: Tensor) -> None:
        """Read `len(out)` rows from row `start` on, converted to the dtype of `out`.

        Args:
            start: the first row.
            out: of the tensor's shape but for the number of rows; strides and device are free.

        Raises:
            UserError: the file ends too early, or cannot be read.
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        rows_at_once = max(1, _BLOCK_BYTES // max(1, row_bytes))
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start_byte + start * row_bytes)
                for first in range(0, len(out), rows_at_once):
                    into = out.narrow(0, first, min(rows_at_once, len(out) - first))
                    is_direct = (
                        into.dtype is self.dtype
                        and into.is_contiguous()
                        and into.device.type == "cpu"
                    )
                    block = into if is_direct else torch.empty(into.shape, dtype=self.dtype)
                    self._fill(file, block)
                    if block is not into:
                        into.copy_(block)
        except OSError as error:
            raise UserError(
                str(self.path), f"cannot be read ({error.strerror})", _DAMAGED
            ) from None

    def _fill(self, file: Any, block: Tensor) -> None:
        values: Any = block.reshape(-1).view(torch.uint8).numpy()
        view = memoryview(values)
        while view:
            count = file.readinto(view)
            if not count:
                raise UserError(str(self.path), "ends too early", _DAMAGED)
            view = view[count:]


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of one file by name, all of them within it and none over another.

    Raises:
        UserError: the file is missing, cut, or its header says what cannot be.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size_bytes < _LENGTH_BYTES or length > size_bytes - _LENGTH_BYTES:
                raise _unreal(path, f"is cut off within its header, at {size_bytes} bytes")
            if length > _MAX_HEADER_BYTES:
                raise _unreal(path, f"has a header of {length} bytes")
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "Complete the folder."
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unreal(path, f"has no safetensors header ({error})") from None
    header.pop("__metadata__", None)
    data_bytes = size_bytes - _LENGTH_BYTES - length
    places = {name: _place(path, name, info, data_bytes) for name, info in header.items()}
    _refuse_overlaps(path, places.items(), data_bytes)
    return {
        name: TensorPlace(path, _LENGTH_BYTES + length + start, shape, dtype)
        for name, (start, _, shape, dtype) in places.items()
    }


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


_Place = tuple[int, int, tuple[int, ...], torch.dtype]


def _place(path: Path, name: str, info: Any, data_bytes: int) -> _Place:
    """First and last byte, shape and dtype of one tensor, which agree."""
    where = f"{path}: tensor {name[:200]!r}"
    try:
        code, shape, (start, stop) = info["dtype"], info["shape"], info["data_offsets"]
        numbers = (*shape, start, stop)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise _unreal(where, "has no dtype, shape and data_offsets") from None
    if code not in DTYPES:
        raise UserError(
            where,
            f"is of dtype {str(code)[:40]}",
            f"Litespark reads {', '.join(DTYPES)}: take weights that are not quantised.",
        )
    num_bytes = math.prod(shape) * DTYPES[code].itemsize
    if stop - start != num_bytes:
        raise _unreal(
            where,
            f"takes {num_bytes} bytes by its shape {shape} of {code}, and {stop - start} here",
        )
    if stop > data_bytes:
        raise _unreal(where, f"ends at byte {stop} of {data_bytes}: the file is cut off")
    return start, stop, tuple(shape), DTYPES[code]


def _refuse_overlaps(path: Path, places: Iterable[tuple[str, _Place]], data_bytes: int) -> None:
    end, before = 0, ""
    for name, (start, stop, *_) in sorted(places, key=lambda item: item[1][:2]):
        if start < end:
            raise _unreal(f"{path}: tensor {name[:200]!r}", f"lies over {before[:200]!r}")
        end, before = stop, name
    if end != data_bytes:
        raise _unreal(path, f"has {data_bytes - end} bytes that belong to no tensor")


def _unreal(where: object, problem: str) -> UserError:
    return UserError(str(where), problem, _DAMAGED)
