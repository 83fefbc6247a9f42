"""Llama 2, 3, 3.1, 3.2 (text) and what was trained on their architecture."""

from __future__ import annotations

from typing import Any

from litespark.checkpoint.hf.config_json import read_shape, write_shape
from litespark.checkpoint.hf.family import Family
from litespark.checkpoint.hf.table import AFTER_ATTENTION, BEFORE_ATTENTION
from litespark.config.schema import ModelConfig


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**write_shape(model), "attention_bias": False, "mlp_bias": False}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    table=(*BEFORE_ATTENTION, *AFTER_ATTENTION),
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
    },
    read=read_shape,
    write=_write,
)
