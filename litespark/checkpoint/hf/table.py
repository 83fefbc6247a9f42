"""How a family's tensors correspond to Litespark's: one table, read in both directions.

Hugging Face stores one matrix for each of q, k and v, and one for each of gate and up; Litespark
stores what is multiplied together as one, and pads the vocabulary.  A family is therefore a table
with a row (`Entry`) for each stored tensor.  All that a `Rule` ever does is move whole rows, so it
is written down once as runs of rows that stand together on both sides; the export, the import, the
start from a Hugging Face folder and the proof all go by `runs`.

Shapes: h hidden, n query heads, g key/value groups, d head size, f feed-forward width,
v vocabulary, V vocabulary with padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from torch import Tensor

from litespark.config.schema import ModelConfig


class Rule(Enum):
    """How the rows of a stored tensor correspond to those of Hugging Face's tensors."""

    PLAIN = "the same tensor"
    VOCABULARY = "V rows <-> v rows: the padding is left away, or filled with zeros"
    QKV = "(n + 2g)d rows <-> q nd, k gd, v gd rows: stored per group as q..q k v"
    GATE_UP = "2f rows <-> gate f, up f rows: stored as all of gate, then all of up"


@dataclass(frozen=True)
class Run:
    """Rows that stand together on both sides.

    Attributes:
        stored_start: their first row in the stored tensor.
        part: which of the entry's Hugging Face tensors they belong to.
        part_start: their first row there.
        num_rows: how many they are.
    """

    stored_start: int
    part: int
    part_start: int
    num_rows: int


@dataclass(frozen=True)
class Entry:
    """One row of a family's table.

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

    def names(self, layer: int | None) -> tuple[str, ...]:
        """Hugging Face's names of one layer's parts; None for a row outside the layers."""
        return tuple(name.format(layer=layer) for name in self.hf_names)

    def stored_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the stored tensor, without the layer axis."""
        heads, groups, dim = model.num_attention_heads, model.num_query_groups, model.head_dim
        sizes = {
            "h": model.hidden_size,
            "d": dim,
            "nd": heads * dim,
            "(n+2g)d": (heads + 2 * groups) * dim,
            "f": model.ffn_hidden_size,
            "2f": 2 * model.ffn_hidden_size,
            "V": model.padded_vocab_size,
        }
        return tuple(sizes[axis] for axis in self.axes)

    def hf_shapes(self, model: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """Shape of each of Hugging Face's tensors."""
        rest = self.stored_shape(model)[1:]
        num_rows = [0] * len(self.hf_names)
        for run in self.runs(model):
            num_rows[run.part] += run.num_rows
        return tuple((rows, *rest) for rows in num_rows)

    def runs(self, model: ModelConfig) -> Iterator[Run]:
        """All rows that both sides have, in the stored order.

        Each part's rows come in its own order too, and without a gap.
        """
        num_rows = self.stored_shape(model)[0]
        if self.rule is Rule.VOCABULARY:
            yield Run(0, 0, 0, model.vocab_size)
        elif self.rule is Rule.GATE_UP:
            half = num_rows // 2
            yield Run(0, 0, 0, half)
            yield Run(half, 1, 0, half)
        elif self.rule is Rule.QKV:
            dim, groups = model.head_dim, model.num_query_groups
            query_rows = model.num_attention_heads // groups * dim
            for group in range(groups):
                start = group * (query_rows + 2 * dim)
                yield Run(start, 0, group * query_rows, query_rows)
                yield Run(start + query_rows, 1, group * dim, dim)
                yield Run(start + query_rows + dim, 2, group * dim, dim)
        else:
            yield Run(0, 0, 0, num_rows)


def entries_of(table: tuple[Entry, ...], model: ModelConfig) -> tuple[Entry, ...]:
    """The rows that a model of this shape has: with tied embeddings there is no LM head."""
    return tuple(entry for entry in table if not (model.tie_embeddings and entry is LM_HEAD))


def stored_tensors(
    entries: Sequence[Entry], model: ModelConfig
) -> Iterator[tuple[Entry, int | None]]:
    """Every stored tensor, layers taken apart, in the order of the forward pass."""
    for is_per_layer, rows in groupby(entries, key=lambda entry: entry.is_per_layer):
        group = tuple(rows)
        for layer in range(model.num_layers) if is_per_layer else (None,):
            yield from ((entry, layer) for entry in group)


def to_hf(
    entry: Entry, layer: int | None, stored: Tensor, model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each Hugging Face tensor that one stored tensor becomes.

    Rows are only moved, so this holds for weights and gradients of any dtype alike.

    Args:
        entry: the row of the table.
        layer: the layer's number from 0, None for a row outside the layers.
        stored: Litespark's tensor of that layer, without the layer axis.
        model: the model's shape.
    """
    for name, shape in zip(entry.names(layer), entry.hf_shapes(model), strict=True):
        part = entry.names(layer).index(name)
        value = stored.new_empty(shape)
        for run in entry.runs(model):
            if run.part == part:
                rows = stored.narrow(0, run.stored_start, run.num_rows)
                value.narrow(0, run.part_start, run.num_rows).copy_(rows)
        yield name, value


LAYER = "model.layers.{layer}."
ATTENTION = "decoder.layers.self_attention."
_MLP = "decoder.layers.mlp."

LM_HEAD = Entry(("lm_head.weight",), "output_layer.weight", ("V", "h"), Rule.VOCABULARY)
EMBEDDING = Entry(
    ("model.embed_tokens.weight",),
    "embedding.word_embeddings.weight",
    ("V", "h"),
    Rule.VOCABULARY,
)
_QKV_NAMES = tuple(LAYER + f"self_attn.{letter}_proj." for letter in "qkv")
QKV_WEIGHT = Entry(
    tuple(name + "weight" for name in _QKV_NAMES),
    ATTENTION + "linear_qkv.weight",
    ("(n+2g)d", "h"),
    Rule.QKV,
)
QKV_BIAS = Entry(
    tuple(name + "bias" for name in _QKV_NAMES),
    ATTENTION + "linear_qkv.bias",
    ("(n+2g)d",),
    Rule.QKV,
)
# What every family here has, in the order of the forward pass.
BEFORE_ATTENTION = (
    EMBEDDING,
    Entry((LAYER + "input_layernorm.weight",), ATTENTION + "linear_qkv.layer_norm_weight", ("h",)),
    QKV_WEIGHT,
)
AFTER_ATTENTION = (
    Entry((LAYER + "self_attn.o_proj.weight",), ATTENTION + "linear_proj.weight", ("h", "nd")),
    Entry(
        (LAYER + "post_attention_layernorm.weight",), _MLP + "linear_fc1.layer_norm_weight", ("h",)
    ),
    Entry(
        (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"),
        _MLP + "linear_fc1.weight",
        ("2f", "h"),
        Rule.GATE_UP,
    ),
    Entry((LAYER + "mlp.down_proj.weight",), _MLP + "linear_fc2.weight", ("h", "f")),
    Entry(("model.norm.weight",), "decoder.final_layernorm.weight", ("h",)),
    LM_HEAD,
)
