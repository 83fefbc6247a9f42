"""The weights that a run starts with, when they are not drawn: `run.init_from`.

Only the model is taken over: step, schedule, samples and optimizer begin anew.  From a Hugging Face
folder each rank reads just the rows of its own part, whatever the layout; nothing is converted on
disk first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from litespark.checkpoint.folder import find_checkpoint
from litespark.checkpoint.hf.config_json import FILE_NAME
from litespark.checkpoint.hf.registry import read_model
from litespark.checkpoint.hf.source import HFSource
from litespark.checkpoint.integrity import MARKER
from litespark.checkpoint.run_state import RunState, check_same_model, shape_differences
from litespark.checkpoint.sharded import model_state
from litespark.config.schema import ModelConfig
from litespark.errors import LitesparkError, raise_user_errors
from litespark.modules.low_rank import is_adapter
from litespark.utils.files import sha256_of_file

_SAMPLED_BYTES = 1 << 20


def is_hf_folder(path: str | Path) -> bool:
    """Whether a path is a Hugging Face folder; else it is, or should be, a checkpoint."""
    return (Path(path) / FILE_NAME).is_file()


def check_initial_weights(path: str, model: ModelConfig) -> None:
    """Find what is wrong with `run.init_from`, in seconds: no weights are read.

    Raises:
        UserError: it is neither, is damaged, or is of another model; every key is named.
    """
    if not is_hf_folder(path):
        checkpoint = find_checkpoint(path)
        check_same_model(RunState.read(checkpoint), checkpoint, model)
        return
    raise_user_errors(
        shape_differences(
            model,
            read_model(Path(path)),
            f"run.init_from = {path} is a model with",
            "Set it to that value.",
        )
    )
    HFSource.open(Path(path))


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


def weights_identity(path: str) -> dict[str, str]:
    """A digest of what `run.init_from` names, which tells other weights apart.

    Of a checkpoint that of its checksums; of a Hugging Face folder that of its configuration and of
    each weight file's name, size, first and last MiB.
    """
    if not is_hf_folder(path):
        return {"checkpoint": sha256_of_file(find_checkpoint(path) / MARKER)}
    digest = hashlib.sha256((Path(path) / FILE_NAME).read_bytes())
    for file in sorted(Path(path).glob("*.safetensors")):
        size_bytes = file.stat().st_size
        digest.update(f"{file.name} {size_bytes}".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_SAMPLED_BYTES))
            content.seek(max(0, size_bytes - _SAMPLED_BYTES))
            digest.update(content.read())
    return {"hugging_face": digest.hexdigest()}


def _pieces(chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """This rank's parts of all stored tensors; their data are the parameters themselves."""
    for entry in nested_values(model_state(chunks)):
        if isinstance(entry, ShardedTensor):
            yield entry
        elif isinstance(entry, ShardedTensorFactory):  # gate and up of SwiGLU are two pieces
            yield from (each for each in nested_values(entry.build()) if each is not None)
