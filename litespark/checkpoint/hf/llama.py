"""The Llama family in Hugging Face's words: a table of tensors and a translation of the shape.

Hugging Face stores one matrix for each of q, k and v, and one for each of gate and up; Litespark
stores what is multiplied together as one.  A family is therefore a table, one row a stored tensor,
and four rules that say how the rows of the two sides correspond; it names both sides, so that one
table serves both directions.

Shapes: h hidden, n query heads, g key/value groups, d head size, f feed-forward width,
v vocabulary, V vocabulary with padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from litespark.config.schema import ModelConfig


class Rule(Enum):
    """How the rows of a stored tensor become those of Hugging Face's tensors."""

    PLAIN = "the same tensor"
    VOCABULARY = "V rows -> v rows: the padding is left away"
    QKV = "(n + 2g)d rows -> q nd, k gd, v gd rows: stored per group as q..q k v"
    GATE_UP = "2f rows -> gate f, up f rows: stored as all of gate, then all of up"


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        hf_names: Hugging Face's names; `{layer}` stands for the layer's number, from 0.
        key: Litespark's key in the checkpoint; tensors of layers have a leading layer axis there.
        axes: the stored tensor's axes without the layer axis, in the words of the legend.
        rule: how the rows correspond.
    """

    hf_names: tuple[str, ...]
    key: str
    axes: tuple[str, ...]
    rule: Rule = Rule.PLAIN

    @property
    def is_per_layer(self) -> bool:
        """Whether each layer has such a tensor."""
        return "{layer}" in self.hf_names[0]

    def stored_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the stored tensor, without the layer axis."""
        heads, groups, dim = model.num_attention_heads, model.num_query_groups, model.head_dim
        sizes = {
            "h": model.hidden_size,
            "nd": heads * dim,
            "(n+2g)d": (heads + 2 * groups) * dim,
            "f": model.ffn_hidden_size,
            "2f": 2 * model.ffn_hidden_size,
            "V": model.padded_vocab_size,
        }
        return tuple(sizes[axis] for axis in self.axes)


_HF = "model.layers.{layer}."
_ATTENTION = "decoder.layers.self_attention."
_MLP = "decoder.layers.mlp."

_LM_HEAD = Entry(("lm_head.weight",), "output_layer.weight", ("V", "h"), Rule.VOCABULARY)
# In the order of the forward pass, which is the order of the exported file.
TABLE = (
    Entry(
        ("model.embed_tokens.weight",),
        "embedding.word_embeddings.weight",
        ("V", "h"),
        Rule.VOCABULARY,
    ),
    Entry((_HF + "input_layernorm.weight",), _ATTENTION + "linear_qkv.layer_norm_weight", ("h",)),
    Entry(
        tuple(_HF + f"self_attn.{name}_proj.weight" for name in "qkv"),
        _ATTENTION + "linear_qkv.weight",
        ("(n+2g)d", "h"),
        Rule.QKV,
    ),
    Entry((_HF + "self_attn.o_proj.weight",), _ATTENTION + "linear_proj.weight", ("h", "nd")),
    Entry(
        (_HF + "post_attention_layernorm.weight",), _MLP + "linear_fc1.layer_norm_weight", ("h",)
    ),
    Entry(
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        _MLP + "linear_fc1.weight",
        ("2f", "h"),
        Rule.GATE_UP,
    ),
    Entry((_HF + "mlp.down_proj.weight",), _MLP + "linear_fc2.weight", ("h", "f")),
    Entry(("model.norm.weight",), "decoder.final_layernorm.weight", ("h",)),
    _LM_HEAD,
)


def entries(model: ModelConfig) -> tuple[Entry, ...]:
    """The rows that a model of this shape has: with tied embeddings there is no LM head."""
    return tuple(entry for entry in TABLE if not (model.tie_embeddings and entry is _LM_HEAD))


def to_hf(
    entry: Entry, layer: int | None, stored: Tensor, model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each Hugging Face tensor that one stored tensor becomes.

    The rules only move rows, so they hold for weights and gradients of any dtype alike; values are
    views of `stored` where that is possible.

    Args:
        entry: the row of the table.
        layer: the layer's number from 0, None for a row outside the layers.
        stored: Litespark's tensor of that layer, without the layer axis.
        model: the model's shape.
    """
    names = (name.format(layer=layer) for name in entry.hf_names)
    yield from zip(names, _split_rows(entry.rule, stored, model), strict=True)


def _split_rows(rule: Rule, stored: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    if rule is Rule.VOCABULARY:
        return (stored[: model.vocab_size],)
    if rule is Rule.QKV:
        heads_per_group = model.num_attention_heads // model.num_query_groups
        grouped = stored.unflatten(0, (model.num_query_groups, heads_per_group + 2, model.head_dim))
        parts = grouped.split((heads_per_group, 1, 1), dim=1)
        return tuple(part.flatten(end_dim=2) for part in parts)
    if rule is Rule.GATE_UP:
        return stored.chunk(2, dim=0)
    return (stored,)


def hf_config(
    model: ModelConfig, dtype_name: str, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """The content of `config.json`.

    Rotary frequencies and dtype stand there twice, in the words of transformers 4
    (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5 (`rope_parameters`,
    `dtype`), with equal values: each version reads its own and ignores or agrees with the other.

    Args:
        model: the shape.
        dtype_name: format of the exported weights, e.g. `bfloat16`.
        bos_id: the tokenizer's id for the begin of a text; None when unknown.
        eos_id: the same for the end.
    """
    scaling = _rope_scaling(model)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": model.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_sequence_length,
    }
