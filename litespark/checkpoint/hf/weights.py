"""The weights of a Hugging Face folder, whatever files they are in.

safetensors is data and nothing else.  Older folders hold pickles (`pytorch_model.bin`), which can
run code when they are loaded carelessly: they are refused, unless asked for, and then read by
torch's loader that builds tensors only (`weights_only`).

The files are those that the index names, and an index may be made up: it may name no file outside
its folder, each file must hold exactly what the index says, and no file may be missing.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from litespark.checkpoint.hf.safetensors_file import read_header
from litespark.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_MAX_INDEX_BYTES = 100_000_000


class StoredTensor(Protocol):
    """A tensor that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The format of its values."""
        ...

    def read_rows(self, start: int, out: Tensor) -> None:
        """Read `len(out)` rows from row `start` on, converted to the dtype of `out`."""
        ...


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a pickled file, mapped into memory."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The format of its values."""
        return self.value.dtype

    def read_rows(self, start: int, out: Tensor) -> None:
        """Read `len(out)` rows from row `start` on, converted to the dtype of `out`."""
        out.copy_(self.value.narrow(0, start, len(out)))


def open_weights(folder: Path, *, allow_pickle: bool = False) -> Mapping[str, StoredTensor]:
    """All tensors of a folder by Hugging Face's names; nothing but headers is read.

    Args:
        folder: as `save_pretrained` makes it.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors, tensors only.

    Raises:
        UserError: there are no weights, or they are not what the index or their headers say; or
            they are pickled and that was not allowed.
    """
    if (folder / INDEX).is_file():
        return _by_index(folder, INDEX, ".safetensors", read_header)
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    pickled = [name for name in (_PICKLED_INDEX, _PICKLED) if (folder / name).is_file()]
    if not pickled:
        raise UserError(
            str(folder), f"holds neither {WEIGHTS} nor {INDEX}", "Give a folder with weights."
        )
    if not allow_pickle:
        raise UserError(
            str(folder / pickled[0]),
            "is a pickle, which can run code",
            "Convert it to safetensors, or give --allow-pickle-weights-only to read tensors only.",
        )
    if pickled[0] == _PICKLED_INDEX:
        return _by_index(folder, _PICKLED_INDEX, ".bin", _read_pickled)
    return _read_pickled(folder / _PICKLED)


def _by_index(
    folder: Path,
    index_name: str,
    suffix: str,
    read: Callable[[Path], Mapping[str, StoredTensor]],
) -> dict[str, StoredTensor]:
    path = folder / index_name
    places = _weight_map(path, suffix)
    found: dict[str, StoredTensor] = {}
    file_of: dict[str, str] = {}
    for name in sorted(set(places.values())):
        for tensor, place in read(folder / name).items():
            if tensor in found:
                raise _index_error(path, f"{tensor} is in both {file_of[tensor]} and {name}")
            found[tensor], file_of[tensor] = place, name
    wrong = [
        f"{tensor} is in {file_of.get(tensor, 'none of its files')}, the index says "
        f"{places.get(tensor, 'nothing of it')}"
        for tensor in sorted(places.keys() | file_of.keys())
        if places.get(tensor) != file_of.get(tensor)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise _index_error(path, "; ".join(wrong[:3]) + more)
    return found


def _weight_map(path: Path, suffix: str) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError("its weight_map is no object, or empty")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _index_error(path, f"cannot be read ({error})") from None
    for tensor, name in places.items():
        is_plain = isinstance(name, str) and "/" not in name and "\\" not in name
        if not is_plain or name.startswith(".") or not name.endswith(suffix):
            raise _index_error(
                path, f"puts {tensor[:200]!r} into {str(name)[:200]!r}, which is no file beside it"
            )
    return places


def _index_error(path: Path, problem: str) -> UserError:
    return UserError(str(path), problem, "It is damaged or made up: fetch the folder again.")


def _read_pickled(path: Path) -> dict[str, StoredTensor]:
    try:
        values = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            str(path), f"holds more than tensors, or is damaged ({reason})", "Do not use it."
        ) from None
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
        for name, value in values.items()
    ):
        raise UserError(str(path), "is no dictionary of tensors", "Do not use it.")
    return {name: PickledTensor(value) for name, value in values.items()}
