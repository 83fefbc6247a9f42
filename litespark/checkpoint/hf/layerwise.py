"""Two large models layer by layer, of which memory holds one layer at a time.

transformers has no call for a single layer that would be the same in all its versions.  But a model
of one layer, whose final norm is taken out and which is given hidden states instead of tokens, is
one; Litespark's side is a pipeline stage of one layer.

Shapes: s tokens, h hidden, v a block of the vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from litespark.checkpoint.hf.config_json import FILE_NAME
from litespark.checkpoint.hf.read import CheckpointReader
from litespark.checkpoint.hf.source import HFSource
from litespark.checkpoint.hf.table import EMBEDDING, LM_HEAD
from litespark.checkpoint.sharded import sharding_metadata
from litespark.config.schema import ModelConfig, RunConfig
from litespark.models.backends import select_backend
from litespark.models.gpt import GPT
from litespark.models.layer_specs import block_spec
from litespark.models.transformer_config import transformer_config

_BLOCK_ROWS = 8192
_FINAL_NORM = "decoder.final_layernorm.weight"


def litespark_hidden(
    reader: CheckpointReader, config: RunConfig, ids_s: Tensor, dtype: torch.dtype
) -> Tensor:
    """Hidden states [s, h] after the final norm, from a checkpoint's weights rounded to `dtype`."""
    model = config.model
    stage = _one_layer(config)
    names = _parameters_by_key(stage)
    hidden_s1h = _embed(reader, ids_s).to(dtype).float()[:, None]
    entries = [entry for entry in reader.family.entries(model) if entry.is_per_layer]
    for layer in range(model.num_layers):
        for entry in entries:
            names[entry.key].copy_(reader.read(entry, layer).to(dtype))
        stage.set_input_tensor([hidden_s1h])
        hidden_s1h = stage(ids_s[None], torch.arange(len(ids_s))[None], None)
    (final,) = (entry for entry in reader.family.entries(model) if entry.key == _FINAL_NORM)
    weight_h = reader.read(final, None).to(dtype).float()
    return torch.nn.functional.rms_norm(
        hidden_s1h[:, 0], weight_h.shape, weight_h, model.norm_epsilon
    )


def hf_hidden(source: HFSource, ids_s: Tensor) -> Tensor:
    """Hidden states [s, h] after the final norm, from transformers' own modules."""
    from transformers import AutoConfig, AutoModel

    values = json.loads((source.folder / FILE_NAME).read_text(encoding="utf-8"))
    kind = values.pop("model_type", source.model.hf_family)
    # The embedding is looked up here: a vocabulary of one row keeps it out of memory.
    values |= {"num_hidden_layers": 1, "vocab_size": 1, "pad_token_id": None, "layer_types": None}
    model: Any = AutoModel.from_config(AutoConfig.for_model(kind, **values)).float().eval()
    norm, model.norm = model.norm, torch.nn.Identity()
    embedding = source.tensors[EMBEDDING.hf_names[0]]
    hidden_sh = torch.empty(len(ids_s), source.model.hidden_size)
    for row, number in enumerate(ids_s):
        embedding.read_rows(int(number), hidden_sh[row : row + 1])
    for layer in range(source.model.num_layers):
        prefix = f"model.layers.{layer}."
        for name, parameter in model.layers[0].named_parameters():
            source.tensors[prefix + name].read_rows(0, parameter.data)
        hidden_sh = model(inputs_embeds=hidden_sh[None], use_cache=False).last_hidden_state[0]
    source.tensors["model.norm.weight"].read_rows(0, norm.weight.data)
    return norm(hidden_sh)


def logits_of(
    reader: CheckpointReader, source: HFSource, ours_sh: Tensor, theirs_sh: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sides' logits [s, v] in fp32; of the LM heads memory holds a piece."""
    model = source.model
    entry = EMBEDDING if model.tie_embeddings else LM_HEAD
    ours, theirs = [], []
    for first, piece_vh in reader.pieces(entry, model.vocab_size):
        for start in range(0, len(piece_vh), _BLOCK_ROWS):
            ours_vh = piece_vh[start : start + _BLOCK_ROWS].to(source.dtype).float()
            theirs_vh = torch.empty(ours_vh.shape)
            source.tensors[entry.hf_names[0]].read_rows(first + start, theirs_vh)
            ours.append(ours_sh @ ours_vh.T)
            theirs.append(theirs_sh @ theirs_vh.T)
    return torch.cat(ours, dim=1), torch.cat(theirs, dim=1)


def _embed(reader: CheckpointReader, ids_s: Tensor) -> Tensor:
    """Rows of the embedding, [s, h], in the stored format."""
    found = []
    for first, piece_vh in reader.pieces(EMBEDDING, reader.model.vocab_size):
        is_here = (ids_s >= first) & (ids_s < first + len(piece_vh))
        found.append((is_here.nonzero()[:, 0], piece_vh[ids_s[is_here] - first]))
    order = torch.cat([places for places, _ in found]).argsort()
    return torch.cat([rows for _, rows in found])[order]


def _one_layer(config: RunConfig) -> GPT:
    model: ModelConfig = config.model.model_copy(update={"num_layers": 1})
    config = config.model_copy(update={"model": model})
    core_config, backend = transformer_config(config), select_backend(config)
    return GPT(
        core_config,
        block_spec(backend, core_config, None),
        model,
        backend,
        virtual_stage=None,
        pre_process=False,
        post_process=False,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    ).eval()


def _parameters_by_key(stage: GPT) -> dict[str, Tensor]:
    """The stage's parameters by their keys in the checkpoint."""
    state: Any = stage.sharded_state_dict(metadata=sharding_metadata())
    return {
        entry.key: entry.data.detach()
        for entry in state.values()
        if isinstance(getattr(entry, "data", None), Tensor)
    }
