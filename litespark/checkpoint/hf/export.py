"""A checkpoint as a folder that Hugging Face's transformers loads.

The model is not built.  The checkpoint stores whole tensors, whatever layout wrote them, so each
layer's are read by themselves, turned by the family's table, converted, and appended to a file.
Memory holds one layer and one file's tensors: a model that took a cluster to train is exported by
one machine without a GPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litespark.checkpoint.hf.folder import (
    model_card,
    new_folder,
    refuse_taken,
    write_json,
    write_tokenizer,
)
from litespark.checkpoint.hf.llama import hf_config
from litespark.checkpoint.hf.read import CheckpointReader
from litespark.checkpoint.hf.shards import MAX_SHARD_BYTES, ShardWriter
from litespark.checkpoint.run_state import RunState
from litespark.data.tokenizers import Tokenizer, load_tokenizer
from litespark.errors import UserError
from litespark.models.transformer_config import DTYPES
from litespark.utils.files import write_text_atomically

EXPORT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
logger = logging.getLogger("litespark.export")


@dataclass(frozen=True)
class ExportedModel:
    """What was written: the folder, the format of the weights, and how much of them."""

    folder: Path
    dtype_name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    weight_files: tuple[str, ...]
    has_tokenizer: bool


def export_checkpoint(
    checkpoint: Path,
    out_dir: Path,
    dtype: str | None = None,
    tokenizer: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportedModel:
    """Write `checkpoint` as a Hugging Face folder; to be called inside `single_process`.

    The folder appears when all of it is on disk.  The tensors are the same, bit for bit, whatever
    layout wrote the checkpoint.

    Args:
        checkpoint: a complete checkpoint (`step_...`).
        out_dir: a folder that does not exist or is empty.
        dtype: a name in `EXPORT_DTYPES`; None keeps the checkpoint's format.
        tokenizer: tokenizer to ship; None takes the one of the checkpoint's run, if it is there.
        max_shard_bytes: largest size of one weight file.

    Raises:
        UserError: `out_dir` is taken, or the checkpoint, the tokenizer or the dtype will not do.
    """
    state = RunState.read(checkpoint)
    model = state.model_config()
    dtype_name = dtype or str(DTYPES[state.precision]).removeprefix("torch.")
    if dtype_name not in EXPORT_DTYPES:
        raise UserError(
            f"dtype {dtype_name}", "is not known", f"Give one of {', '.join(EXPORT_DTYPES)}."
        )
    refuse_taken(out_dir)
    reader = CheckpointReader(checkpoint)
    shipped = _open_tokenizer(state, tokenizer)
    with new_folder(out_dir) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        for name, tensor in reader.tensors(model):
            writer.add(name, convert(name, tensor, EXPORT_DTYPES[dtype_name]))
        files = writer.finish()
        bos_id = shipped.bos_id if shipped else None
        eos_id = shipped.eos_id if shipped else None
        write_json(folder / "config.json", hf_config(model, dtype_name, bos_id, eos_id))
        ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        write_json(folder / "generation_config.json", ids)
        if shipped is not None:
            write_tokenizer(folder, shipped, model.max_sequence_length)
        card = model_card(state, writer.num_parameters, dtype_name)
        write_text_atomically(folder / "README.md", card)
    return ExportedModel(
        folder=out_dir,
        dtype_name=dtype_name,
        num_tensors=writer.num_tensors,
        num_parameters=writer.num_parameters,
        num_bytes=writer.num_bytes,
        weight_files=tuple(files),
        has_tokenizer=shipped is not None,
    )


def convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of its own in another format.

    Raises:
        UserError: a value does not fit: float16 ends at 65504, far below the other formats.
    """
    converted = tensor.to(dtype, copy=True).contiguous()
    if dtype is torch.float16 and bool((converted.isinf() & tensor.isfinite()).any()):
        raise UserError(
            f"dtype float16: {name}",
            f"holds {tensor.abs().max().item():g}, and float16 ends at 65504",
            "Export as bfloat16 or float32.",
        )
    return converted


def _open_tokenizer(state: RunState, path: str | None) -> Tokenizer | None:
    """The tokenizer that the user names, else that of the run; None, with a warning, if it is gone.

    Raises:
        UserError: the named tokenizer cannot be read, or has more tokens than the model.
    """
    is_named = path is not None
    path = path or state.data.get("tokenizer")
    if path is None:
        logger.warning("the run names no data.tokenizer: exported without tokenizer files")
        return None
    if not is_named and not Path(path).exists():
        logger.warning(
            "%s, the run's tokenizer, is not there (seen from %s): exported without it; "
            "name it with --tokenizer",
            *(path, Path.cwd()),
        )
        return None
    tokenizer = load_tokenizer(path)
    vocab_size = state.model_config().vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {path}",
            f"has {tokenizer.vocab_size} tokens, the model only {vocab_size}",
            "Give the tokenizer that the model was trained with.",
        )
    return tokenizer
