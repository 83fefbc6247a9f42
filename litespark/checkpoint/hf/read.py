"""Reads rows of a checkpoint's tensors, whatever layout wrote it.

A checkpoint is one whole tensor for each kind of weight, with a leading axis for the layers, stored
in pieces: each rank wrote what it held.  The index (`.metadata`) says which piece lies where in
which file.  To read some rows of one layer, take the pieces that overlap them and copy each into
its place; which ranks there were does not matter.  A piece can only be read as a whole, so a tensor
that is too large to be held as one is read along the borders of its pieces (`pieces`).

The index is a pickle: read it where the patch `safe_checkpoint_metadata` is in place, as it is
inside `litespark.training.single.single_process`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from litespark.checkpoint.folder import STATE
from litespark.checkpoint.hf.family import Family
from litespark.checkpoint.hf.table import Entry, stored_tensors
from litespark.checkpoint.sharded import check_places
from litespark.config.schema import ModelConfig
from litespark.errors import UserError


@dataclass(frozen=True)
class _Box:
    """Part of a stored tensor, the layer axis included."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def overlap(self, other: _Box) -> _Box | None:
        """What both have, None if that is nothing."""
        ends = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        spans = [(max(a, b), min(a + n, b + m)) for a, n, b, m in ends]
        if any(start >= stop for start, stop in spans):
            return None
        return _Box(
            tuple(start for start, _ in spans), tuple(stop - start for start, stop in spans)
        )

    def within(self, tensor: Tensor, whole: _Box) -> Tensor:
        """This box of a tensor that is `whole`; a view."""
        places = zip(self.offsets, whole.offsets, self.sizes, strict=True)
        for axis, (start, begin, size) in enumerate(places):
            tensor = tensor.narrow(axis, start - begin, size)
        return tensor


class CheckpointReader:
    """The tensors of one checkpoint, without a model and without a process group.

    Args:
        checkpoint: a Litespark checkpoint (`step_...`).
        family: whose table names the tensors.
        model: the shape that they must have.
        state: the folder of the tensors, where it is not the checkpoint's `state`.

    Raises:
        UserError: the index cannot be read, or names a file elsewhere.
    """

    def __init__(
        self, checkpoint: Path, family: Family, model: ModelConfig, state: Path | None = None
    ) -> None:
        self.family, self.model = family, model
        self._folder = checkpoint / STATE if state is None else state
        with self._reporting():
            self._storage = FileSystemReader(str(self._folder))
            self._index: Metadata = self._storage.read_metadata()
            check_places(self._index)

    def read(
        self, entry: Entry, layer: int | None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows of one stored tensor, or of one layer's part of it, in the stored format.

        Args:
            entry: the row of the table.
            layer: the layer's number from 0, None for a row outside the layers.
            start: first row.
            stop: the row after the last; None: all.

        Raises:
            UserError: the checkpoint is damaged, lacks the tensor or holds one of another shape.
        """
        shape = entry.stored_shape(self.model)
        stop = shape[0] if stop is None else stop
        sizes = (stop - start, *shape[1:])
        lead = () if layer is None else (layer,)
        rest = (0,) * (len(shape) - 1)
        wanted = _Box((*lead, start, *rest), (*(1 for _ in lead), *sizes))
        stored = self._stored(entry)
        pieces = [
            (piece, box, shared)
            for piece in stored.chunks
            for box in (_box_of(piece),)
            if (shared := box.overlap(wanted)) is not None
        ]
        if len(pieces) == 1 and pieces[0][2] == wanted:
            piece, box, _ = pieces[0]
            return wanted.within(self._load(entry.key, piece), box).reshape(sizes)
        room = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        filled = 0
        for piece, box, shared in pieces:
            shared.within(room, wanted).copy_(shared.within(self._load(entry.key, piece), box))
            filled += torch.Size(shared.sizes).numel()
        if filled != room.numel():
            raise self._unusable(f"{entry.key} is not there as a whole")
        return room.view(sizes)

    def pieces(self, entry: Entry, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """The first rows of a tensor outside the layers, piece by piece, each with its first row.

        Raises:
            UserError: see `read`.
        """
        boxes = [_box_of(piece) for piece in self._stored(entry).chunks]
        cuts = sorted({box.offsets[0] for box in boxes if box.offsets[0] < num_rows})
        for start, stop in zip(cuts, [*cuts[1:], num_rows], strict=True):
            yield start, self.read(entry, None, start, stop)

    def tensors(self) -> Iterator[tuple[Entry, int | None]]:
        """Every stored tensor, layers taken apart, in the order of the forward pass."""
        return stored_tensors(self.family.entries(self.model), self.model)

    def check(self) -> None:
        """Whether every tensor of the family is there, in its shape.

        Raises:
            UserError: one is not.
        """
        for entry in self.family.entries(self.model):
            self._stored(entry)

    def _stored(self, entry: Entry) -> TensorStorageMetadata:
        shape = entry.stored_shape(self.model)
        shape = (self.model.num_layers, *shape) if entry.is_per_layer else shape
        stored = self._index.state_dict_metadata.get(entry.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise self._unusable(f"it holds no {entry.key}")
        if tuple(stored.size) != shape:
            raise self._unusable(f"{entry.key} is {tuple(stored.size)}, the model has {shape}")
        return stored

    def _load(self, key: str, piece: ChunkStorageMetadata) -> Tensor:
        place = (self._index.storage_data or {}).get(MetadataIndex(key, piece.offsets))
        if place is None:
            raise self._unusable(f"a piece of {key} is nowhere")
        with self._reporting(), open(self._folder / place.relative_path, "rb") as file:
            view = self._storage._slice_file(file, place)
            value = torch.load(view, map_location="cpu", weights_only=True)
            if not isinstance(value, Tensor) or value.shape != piece.sizes:
                raise ValueError(f"a piece of {key} is not what the index says")
            return value

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """What a missing, cut or overwritten file makes torch raise, as one message."""
        try:
            yield
        except (
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            LookupError,
            AssertionError,
            pickle.UnpicklingError,
        ) as error:
            raise self._unusable(f"{type(error).__name__}: {error}") from error

    def _unusable(self, reason: str) -> UserError:
        return UserError(
            str(self._folder),
            f"cannot be read ({reason})",
            "It is damaged or incomplete: take another checkpoint.",
        )


def _box_of(piece: ChunkStorageMetadata) -> _Box:
    return _Box(tuple(piece.offsets), tuple(piece.sizes))
