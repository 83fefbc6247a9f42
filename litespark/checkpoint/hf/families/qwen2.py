"""Qwen2 and Qwen2.5, dense: a Llama with biases of query, key and value."""

from __future__ import annotations

from typing import Any

from litespark.checkpoint.hf.config_json import ConfigJson, read_shape, write_shape
from litespark.checkpoint.hf.family import Family
from litespark.checkpoint.hf.table import AFTER_ATTENTION, BEFORE_ATTENTION, QKV_BIAS
from litespark.config.schema import ModelConfig

# Their config.json names a window also where it is not in use.
NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
}


def refuse_window(config: ConfigJson) -> None:
    """Refuse a window that only some of the layers have, which is how Qwen uses it.

    Raises:
        UserError: it is in use.
    """
    config.require("use_sliding_window", False, None)
    kinds = config.get("layer_types")
    if kinds is not None and set(map(str, kinds)) != {"full_attention"}:
        config.require("layer_types", None)


def _read(config: ConfigJson) -> dict[str, Any]:
    refuse_window(config)
    return {**read_shape(config), "qkv_bias": True}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**write_shape(model), **NO_WINDOW}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=(*BEFORE_ATTENTION, QKV_BIAS, *AFTER_ATTENTION),
    defaults=DEFAULTS,
    read=_read,
    write=_write,
)
