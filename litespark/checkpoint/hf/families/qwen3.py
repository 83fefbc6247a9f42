"""Qwen3, dense: a Llama whose queries and keys pass an RMSNorm, head by head, before RoPE."""

from __future__ import annotations

from typing import Any

from litespark.checkpoint.hf.config_json import ConfigJson, read_shape, write_shape
from litespark.checkpoint.hf.families.qwen2 import DEFAULTS, NO_WINDOW, refuse_window
from litespark.checkpoint.hf.family import Family
from litespark.checkpoint.hf.table import (
    AFTER_ATTENTION,
    ATTENTION,
    BEFORE_ATTENTION,
    LAYER,
    Entry,
)
from litespark.config.schema import ModelConfig

_HEAD_NORMS = tuple(
    Entry(
        (LAYER + f"self_attn.{kind}_norm.weight",), ATTENTION + f"{kind}_layernorm.weight", ("d",)
    )
    for kind in "qk"
)


def _read(config: ConfigJson) -> dict[str, Any]:
    refuse_window(config)
    return {**read_shape(config), "qk_norm": True}


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**write_shape(model), "attention_bias": False, **NO_WINDOW}


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=(*BEFORE_ATTENTION, *_HEAD_NORMS, *AFTER_ATTENTION),
    defaults={**DEFAULTS, "head_dim": 128},
    read=_read,
    write=_write,
)
