"""A Hugging Face folder as if it were stored in Litespark's way: any part of any stored tensor.

The folder's tensors are checked against the family's table first, all mistakes at once.  Then rows
are read straight from the files into their places: whole tensors for an import, and for a start of
training what one rank holds of them, at any layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from litespark.checkpoint.hf.config_json import ConfigJson
from litespark.checkpoint.hf.registry import family_of_config, read_model
from litespark.checkpoint.hf.table import EMBEDDING, LM_HEAD, Entry
from litespark.checkpoint.hf.weights import StoredTensor, open_weights
from litespark.config.schema import ModelConfig
from litespark.errors import UserError

# What old versions of transformers stored although it follows from config.json.
_DERIVED = ("rotary_emb.inv_freq",)
_SHOWN = 5
_BLOCK_ROWS_BYTES = 32 << 20


@dataclass(frozen=True)
class HFSource:
    """A checked folder.

    Attributes:
        folder: where it is.
        model: its shape; the padding of the vocabulary is the default's.
        entries: the rows of its family's table that it has.
        tensors: its tensors by Hugging Face's names.
    """

    folder: Path
    model: ModelConfig
    entries: tuple[Entry, ...]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path, *, allow_pickle: bool = False) -> HFSource:
        """Read config.json and the headers; no weights yet.

        Raises:
            UserError: the folder is none, of a model that is not computed, or its tensors are not
                those that config.json asks for; all that are missing, unexpected or of another
                shape are named.
        """
        if not folder.is_dir():
            raise UserError(str(folder), "is no folder", "Give a folder of Hugging Face's.")
        family, model = family_of_config(ConfigJson.read(folder)), read_model(folder)
        tensors = open_weights(folder, allow_pickle=allow_pickle)
        if model.num_layers > len(tensors):  # before names are made for a number made up
            raise UserError(
                f"{folder / 'config.json'}: num_hidden_layers = {model.num_layers}",
                f"is more than the {len(tensors)} tensors of the folder",
                "Complete the folder.",
            )
        source = cls(folder, model, family.entries(model), tensors)
        source._check_tensors()
        return source

    def with_model(self, model: ModelConfig) -> HFSource:
        """The same tensors for a model whose vocabulary is padded otherwise."""
        return replace(self, model=model)

    @property
    def dtype(self) -> torch.dtype:
        """The format that holds all values exactly: the tensors' own, if they have one alone."""
        dtypes = {self.tensors[name].dtype for name, _ in self._expected()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def read(self, entry: Entry, layer: int | None, start: int, out: Tensor) -> None:
        """Rows of a stored tensor, from `start` on, into `out`; rows of padding become 0.

        Args:
            entry: the row of the table.
            layer: the layer's number from 0, None for a row outside the layers.
            start: the first row, in the stored order.
            out: [rows, ...] as `entry.stored_shape`; converted to its dtype.

        Raises:
            UserError: a file ends too early, or cannot be read.
        """
        names, stop = entry.names(layer), start + len(out)
        covered = 0
        for run in entry.runs(self.model):
            first = max(start, run.stored_start)
            last = min(stop, run.stored_start + run.num_rows)
            if first < last:
                tensor = self.tensors[names[run.part]]
                rows = out.narrow(0, first - start, last - first)
                tensor.read_rows(run.part_start + first - run.stored_start, rows)
                covered += last - first
        if covered < len(out):  # padding comes after all real rows
            out[covered:].zero_()

    def read_columns(
        self, entry: Entry, layer: int | None, offsets: tuple[int, int], out: Tensor
    ) -> None:
        """A box of a stored matrix: [rows, columns] from the given row and column on."""
        width = entry.stored_shape(self.model)[1]
        if out.size(1) == width:
            self.read(entry, layer, offsets[0], out)
            return
        at_once = max(1, _BLOCK_ROWS_BYTES // (width * out.element_size()))
        for first in range(0, len(out), at_once):
            into = out[first : first + at_once]
            rows = torch.empty((len(into), width), dtype=out.dtype)
            self.read(entry, layer, offsets[0] + first, rows)
            into.copy_(rows.narrow(1, offsets[1], out.size(1)))

    def layers_of(self, entry: Entry) -> Iterator[int | None]:
        """The layers that have a tensor of this row; None alone for a row outside the layers."""
        yield from range(self.model.num_layers) if entry.is_per_layer else (None,)

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for entry in self.entries:
            shapes = entry.hf_shapes(self.model)
            for layer in self.layers_of(entry):
                yield from zip(entry.names(layer), shapes, strict=True)

    def _check_tensors(self) -> None:
        expected = dict(self._expected())
        missing = [name for name in expected if name not in self.tensors]
        unexpected = [
            name
            for name in self.tensors
            if name not in expected and not name.endswith(_DERIVED) and not self._is_tied_copy(name)
        ]
        other = [
            f"{name} {self.tensors[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        parts = [
            f"{what} {', '.join(names[:_SHOWN])}"
            + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            for what, names in (
                ("lacks", missing),
                ("has unexpected", unexpected),
                ("has of another shape", other),
            )
            if names
        ]
        if parts:
            raise UserError(
                str(self.folder),
                f"does not hold what its config.json asks for: it {'; it '.join(parts)}",
                "Give the config.json that belongs to the weights.",
            )

    def _is_tied_copy(self, name: str) -> bool:
        """An LM head that a folder with tied embeddings holds all the same, and rightly so."""
        if not self.model.tie_embeddings or name not in LM_HEAD.hf_names:
            return False
        head, embedding = self.tensors[name], self.tensors.get(EMBEDDING.hf_names[0])
        if embedding is None or head.shape != embedding.shape or len(head.shape) != 2:
            return False
        at_once = max(1, _BLOCK_ROWS_BYTES // max(1, head.shape[1] * 4))
        for first in range(0, head.shape[0], at_once):
            shape = (min(at_once, head.shape[0] - first), head.shape[1])
            one, other = torch.empty(shape), torch.empty(shape)
            head.read_rows(first, one)
            embedding.read_rows(first, other)
            if not torch.equal(one, other):
                return False
        return True
