"""Fills a model in memory from a Hugging Face folder, whatever the layout.

Each rank reads just the rows of its own part; nothing is converted on disk first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from litespark.checkpoint.hf.source import HFSource
from litespark.checkpoint.sharded import model_state
from litespark.config.schema import ModelConfig
from litespark.errors import LitesparkError
from litespark.modules.low_rank import is_adapter


def fill_from_hf(folder: Path, chunks: Sequence[torch.nn.Module], model: ModelConfig) -> None:
    """Fill this rank's chunks with its part of a Hugging Face folder, which has been checked.

    Raises:
        UserError: a file ends too early, or cannot be read.
    """
    source = HFSource.open(folder)
    # The padding of the vocabulary is this run's.
    padding = {"vocab_padding_multiple": model.vocab_padding_multiple}
    source = source.with_model(source.model.model_copy(update=padding))
    entry_of = {entry.key: entry for entry in source.entries}
    for piece in _pieces(chunks):
        if is_adapter(piece.key):  # begins with nothing to add
            continue
        entry = entry_of.get(piece.key)
        if entry is None or piece.data is None:
            raise LitesparkError(f"{piece.key} is in no table of {source.folder}")
        lead = piece.prepend_axis_num  # 1 for tensors of layers
        layer = piece.global_offset[0] if lead else None
        offsets, out = piece.global_offset[lead:], piece.data.detach()
        if out.dim() == 2:
            source.read_columns(entry, layer, (offsets[0], offsets[1]), out)
        else:
            source.read(entry, layer, offsets[0], out)


def _pieces(chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """This rank's parts of all stored tensors; their data are the parameters themselves."""
    for entry in nested_values(model_state(chunks)):
        if isinstance(entry, ShardedTensor):
            yield entry
        elif isinstance(entry, ShardedTensorFactory):  # gate and up of SwiGLU are two pieces
            yield from (each for each in nested_values(entry.build()) if each is not None)
