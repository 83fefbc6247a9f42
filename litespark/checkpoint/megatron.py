"""Megatron-LM's `torch_dist` checkpoints of GPT models, as the source of an import.

Their tensors are named and laid out as Litespark's, because both are megatron-core's.  What differs
is where the shape stands (`common.pt` holds the arguments of the run, as an argparse.Namespace) and
how far the vocabulary is padded.

`common.pt` is a pickle.  It is read by torch's loader for plain data, with the few classes below
allowed that hold nothing but values; what needs more is not loaded, and the shape must then be
given with a configuration.  To be called inside `single_process`, whose patches make the reading of
the index safe too.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from litespark.checkpoint.hf.import_ import WeightSource
from litespark.checkpoint.hf.read import CheckpointReader
from litespark.checkpoint.hf.registry import family_of_model
from litespark.checkpoint.hf.table import EMBEDDING, Entry, Rule
from litespark.config.schema import ModelConfig
from litespark.errors import UserError

_LATEST = "latest_checkpointed_iteration.txt"
_COMMON = "common.pt"
_GIVE_CONFIG = "Give the shape with --config FILE, a Litespark configuration of the same model."
# What a Llama-like model needs to have been trained with, and Megatron-LM's other choices.
_REQUIRED = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "apply_layernorm_1p": (False,),
    "multi_latent_attention": (False,),
    "num_experts": (None, 0),
    "window_size": (None,),
}


def open_megatron(path: Path, model: ModelConfig | None) -> WeightSource:
    """A checkpoint's weights; nothing but its index is read.

    Args:
        path: the folder of an iteration, or that of all iterations.
        model: its shape; None takes it from the checkpoint's arguments.

    Raises:
        UserError: it is no such checkpoint, of a model that Litespark does not compute, or damaged.
    """
    folder = _iteration(path)
    if model is None:
        model = _model(_arguments(folder / _COMMON), folder / _COMMON)
    padded_rows, dtype = _embedding(folder)
    if padded_rows < model.vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size}",
            f"is more than the {padded_rows} rows of the embedding in {folder}",
            "Give the vocabulary that the model was trained with.",
        )
    stored = model.model_copy(update={"vocab_padding_multiple": padded_rows})
    family = family_of_model(model)
    reader = CheckpointReader(folder, family, stored, state=folder)
    reader.check()

    def read(entry: Entry, layer: int | None, start: int, out: Tensor) -> None:
        num_rows = len(out)
        if entry.rule is Rule.VOCABULARY:  # beyond the real rows lies the padding of one side
            num_rows = max(0, min(num_rows, model.vocab_size - start))
        if num_rows:
            out[:num_rows].copy_(reader.read(entry, layer, start, start + num_rows))
        out[num_rows:].zero_()

    return WeightSource(folder, model, family.entries(model), dtype, read)


def _iteration(path: Path) -> Path:
    """The folder that holds the tensors."""
    latest = path / _LATEST
    if latest.is_file():
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\d{1,12}|release", name):
            raise UserError(str(latest), f"says {name[:40]!r}", "Name the folder of an iteration.")
        path = path / ("release" if name == "release" else f"iter_{int(name):07d}")
    if not (path / ".metadata").is_file():
        raise UserError(
            str(path),
            "is no torch_dist checkpoint of Megatron-LM: it holds no .metadata",
            "Give the folder of an iteration; legacy formats (mp_rank_..., zarr) are not read.",
        )
    return path


def _arguments(path: Path) -> dict[str, Any]:
    allowed: list[Any] = [argparse.Namespace, *_enums()]
    try:
        with torch.serialization.safe_globals(allowed):
            common = torch.load(path, map_location="cpu", weights_only=True)
        arguments = vars(common["args"])
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            str(path), f"holds more than plain data, or is damaged ({reason})", _GIVE_CONFIG
        ) from None
    except (KeyError, TypeError):
        raise UserError(str(path), "holds no arguments", _GIVE_CONFIG) from None
    return arguments


def _enums() -> list[type]:
    """Enumerations of megatron-core that its arguments hold."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    return [AttnBackend, ModelType]


def _model(arguments: dict[str, Any], path: Path) -> ModelConfig:
    """The shape in Litespark's words."""
    for name, allowed in _REQUIRED.items():
        if name in arguments and arguments[name] not in allowed:
            raise UserError(
                f"{path}: {name} = {arguments[name]!r}",
                "is of a model that Litespark does not compute",
                f"It computes {name} = {allowed[0]!r}.",
            )
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else None
    try:
        values: dict[str, Any] = {
            "num_layers": arguments["num_layers"],
            "hidden_size": arguments["hidden_size"],
            "ffn_hidden_size": arguments["ffn_hidden_size"],
            "num_attention_heads": arguments["num_attention_heads"],
            "num_query_groups": groups or arguments["num_attention_heads"],
            "head_dim": arguments.get("kv_channels"),
            "vocab_size": arguments.get("vocab_size") or arguments["padded_vocab_size"],
            "max_sequence_length": arguments["max_position_embeddings"],
            "norm_epsilon": arguments["norm_epsilon"],
            "rope_theta": float(arguments.get("rotary_base", 10000)),
            "tie_embeddings": not arguments["untie_embeddings_and_output_weights"],
            "qkv_bias": bool(arguments.get("add_qkv_bias", False)),
            "qk_norm": bool(arguments.get("qk_layernorm", False)),
        }
        if arguments.get("use_rope_scaling"):  # the other constants are Llama 3.1's, fixed
            values["rope_scaling"] = {"factor": float(arguments.get("rope_scaling_factor", 8.0))}
        return ModelConfig.model_validate(values)
    except KeyError as error:
        raise UserError(str(path), f"lacks the argument {error.args[0]}", _GIVE_CONFIG) from None
    except (ValidationError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(str(path), f"is of no possible model ({first})", _GIVE_CONFIG) from None


def _embedding(folder: Path) -> tuple[int, torch.dtype]:
    """Rows of the stored embedding, padding included, and the weights' format."""
    try:
        index = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(
            str(folder / ".metadata"), f"cannot be read ({error})", "Take another checkpoint."
        ) from None
    stored = index.get(EMBEDDING.key)
    if not isinstance(stored, TensorStorageMetadata) or not stored.size:
        raise UserError(
            str(folder), f"holds no {EMBEDDING.key}", "Give a GPT checkpoint of megatron-core."
        )
    return stored.size[0], stored.properties.dtype
