"""Litespark's models are transformers': same weights, same loss, same gradients.

The weights and the gradients go through the table that the export uses, so the test covers the
architecture (RoPE, norms, grouped queries, SwiGLU, the loss over a padded vocabulary) and the table
at once: a wrong row would give another loss or put a gradient in another place.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from litespark.checkpoint.hf.registry import config_json, family_of_model
from litespark.checkpoint.hf.table import to_hf
from litespark.checkpoint.sharded import sharding_metadata
from litespark.config.schema import RunConfig
from litespark.training.single import single_process
from tests.integration.tiny import build, tiny_values

# Both sides compute in fp32 (unit roundoff u = 6e-8) and sum in another order.  A value passes at
# most 2 layers of 5 matrix products with sums of at most 128 terms, forward and backward:
# 2 * 2 * 10 * sqrt(128) * u = 3e-5 if all errors added up in size; they are random, and add up to
# their root: sqrt(40) * sqrt(128) * u = 4e-6.
RELATIVE = 1e-5

SHAPES = {
    "gqa": {},
    "mha": {"num_query_groups": 4},
    "mqa": {"num_query_groups": 1},
    "tied": {"tie_embeddings": True},
    "rope_theta": {"rope_theta": 500000.0},
    # With 16 as the unscaled length, waves of all three kinds (kept, between, slowed) are there.
    "llama3_rope": {
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_sequence_length": 16,
        }
    },
    "head_dim": {"head_dim": 24},
    "padded_vocabulary": {"vocab_size": 101, "vocab_padding_multiple": 64},
    "padded_and_tied": {"vocab_size": 101, "vocab_padding_multiple": 64, "tie_embeddings": True},
    "norm_epsilon": {"norm_epsilon": 0.1},
    "mistral": {"family": "mistral", "sliding_window": 64},
    "qkv_bias": {"qkv_bias": True},
    "qkv_bias_mqa": {"qkv_bias": True, "num_query_groups": 1, "head_dim": 24},
    "qk_norm": {"qk_norm": True},
    "qk_norm_head_dim": {"qk_norm": True, "head_dim": 24, "tie_embeddings": True},
}


def stored_parameters(model):
    """Parameters by checkpoint key and layer, as the model's own sharded state describes them."""
    found = {}
    for name, entry in model.sharded_state_dict(metadata=sharding_metadata()).items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[:2] == ["decoder", "layers"] else None
        if not name.endswith("_extra_state"):  # what Transformer Engine would keep beside weights
            found[entry.key, layer] = entry.data
    return found


def in_hf_words(shape, tensors):
    """The table applied to one tensor a parameter."""
    return {
        name: value
        for entry in family_of_model(shape).entries(shape)
        for layer in (range(shape.num_layers) if entry.is_per_layer else (None,))
        for name, value in to_hf(entry, layer, tensors[entry.key, layer], shape)
    }


def in_transformers(shape):
    values = config_json(shape, "float32", None, None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


def relative_difference(value, expected):
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_loss_and_gradients_equal_transformers(changes):
    config = RunConfig.model_validate(tiny_values("unused", **changes))
    shape = config.model
    tokens_bs = torch.randint(shape.vocab_size, (2, 48), generator=torch.manual_seed(3))
    with single_process():
        (model,) = build(config)
        parameters = stored_parameters(model)
        twin = in_transformers(shape)
        weights = {n: p.detach().clone() for n, p in in_hf_words(shape, parameters).items()}
        if shape.tie_embeddings:  # transformers lists the one matrix under both of its names
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        twin.load_state_dict(weights, strict=True)

        positions_bs = torch.arange(48).expand(2, -1)
        labels_bs = tokens_bs.roll(-1, dims=1)
        losses_bs = model(tokens_bs, positions_bs, None, labels=labels_bs)
        loss = losses_bs[:, :-1].mean()  # the last token has no next one
        loss.backward()
        expected = twin(input_ids=tokens_bs, labels=tokens_bs).loss
        expected.backward()

    loss_difference = abs(loss.item() / expected.item() - 1)
    assert loss_difference < RELATIVE
    gradients = in_hf_words(shape, {place: p.grad for place, p in parameters.items()})
    differences = {
        name: relative_difference(gradients[name], parameter.grad)
        for name, parameter in twin.named_parameters()
    }
    assert differences.keys() == gradients.keys()
    worst = max(differences, key=lambda name: differences[name])
    print(f"loss {loss_difference:.1e}, {worst} {differences[worst]:.1e}")
    assert differences[worst] < RELATIVE, worst
    for place, parameter in parameters.items():
        if place[0] in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert not parameter.grad[shape.vocab_size :].any(), "padding must not learn"
