"""Reads single layers of a checkpoint's tensors, whatever layout wrote it.

A checkpoint is one whole tensor for each kind of weight, with a leading axis for the layers, stored
in pieces: each rank wrote what it held.  The index (`.metadata`) says which piece lies where in
which file.  To read one layer, take the pieces that overlap it and copy each into its place; which
ranks there were does not matter.  torch's checkpoint reader does both; what is written here is only
what to ask it for.

The index is a pickle: read it where the patch `safe_checkpoint_metadata` is in place, as it is
inside `litespark.training.single.single_process`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from litespark.checkpoint.folder import STATE
from litespark.checkpoint.hf.llama import Entry, entries, to_hf
from litespark.checkpoint.sharded import check_places
from litespark.config.schema import ModelConfig
from litespark.errors import UserError


class CheckpointReader:
    """The tensors of one checkpoint, without a model and without a process group.

    Raises:
        UserError: the index cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint / STATE
        with self._reporting():
            self._storage = FileSystemReader(str(self._folder))
            index = self._storage.read_metadata()
            check_places(index)
            self._storage.set_up_storage_reader(index, is_coordinator=True)
        self._index = index.state_dict_metadata

    def tensors(self, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face's name and the value of every tensor of a Llama, in the order of the forward
        pass, in the stored format; at most one layer is held at a time.

        Raises:
            UserError: the checkpoint is damaged, lacks a tensor or holds one of another shape.
        """
        for is_per_layer, rows in groupby(entries(model), key=lambda entry: entry.is_per_layer):
            group = tuple(rows)
            layers: Sequence[int | None] = range(model.num_layers) if is_per_layer else (None,)
            for layer in layers:
                for entry in group:
                    yield from to_hf(entry, layer, self.read(entry, layer, model), model)

    def read(self, entry: Entry, layer: int | None, model: ModelConfig) -> Tensor:
        """One stored tensor, or one layer's part of it, of `entry.stored_shape`.

        Raises:
            UserError: the checkpoint is damaged, lacks the tensor or holds one of another shape.
        """
        shape = torch.Size(entry.stored_shape(model))
        stored = self._stored(entry, shape if layer is None else (model.num_layers, *shape))
        offsets, sizes = [0] * len(shape), shape
        if layer is not None:
            offsets, sizes = [layer, *offsets], torch.Size((1, *shape))
        room = torch.empty(sizes, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), sizes)
        items = create_read_items_for_chunk_list(entry.key, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != room.numel():
            raise self._unusable(f"{entry.key} is not there as a whole")
        with self._reporting():
            self._storage.read_data(LoadPlan(items), _Into(room)).wait()
        return room.view(shape)

    def _stored(self, entry: Entry, shape: tuple[int, ...]) -> TensorStorageMetadata:
        stored = self._index.get(entry.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise self._unusable(f"it holds no {entry.key}")
        if tuple(stored.size) != tuple(shape):
            raise self._unusable(
                f"{entry.key} is {tuple(stored.size)}, run_state.json's model has {tuple(shape)}"
            )
        return stored

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


class _Into(DefaultLoadPlanner):
    """Tells the reader where the values of a piece go."""

    def __init__(self, room: Tensor) -> None:
        super().__init__()
        self._room = room

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the room that the piece fills."""
        part = self._room
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for axis, (start, length) in enumerate(places):
            part = part.narrow(axis, start, length)
        return part
