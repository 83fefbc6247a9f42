"""Mistral 7B and its relatives: a Llama, whose first versions forget beyond a window.

With a window of W each token attends to the last W tokens, itself included.  Up to W tokens that
is full attention, which is what Litespark computes; longer sequences are refused by
`model.sliding_window`.
"""

from __future__ import annotations

from typing import Any

from litespark.checkpoint.hf.config_json import ConfigJson, read_shape, write_shape
from litespark.checkpoint.hf.family import Family
from litespark.checkpoint.hf.table import AFTER_ATTENTION, BEFORE_ATTENTION
from litespark.config.schema import ModelConfig


def _read(config: ConfigJson) -> dict[str, Any]:
    values = read_shape(config)
    if config.get("sliding_window") is not None:
        values["sliding_window"] = config.integer("sliding_window")
    return values


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**write_shape(model), "sliding_window": model.sliding_window}


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    table=(*BEFORE_ATTENTION, *AFTER_ATTENTION),
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "initializer_range": 0.02,
    },
    read=_read,
    write=_write,
)
