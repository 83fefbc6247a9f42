"""Checks of the model's shape."""

from __future__ import annotations

from collections.abc import Iterator

from litespark.config.schema import RunConfig
from litespark.errors import UserError


def check_model(config: RunConfig) -> Iterator[UserError]:
    """The mistakes of a model that is to be split over `parallel.tensor` ranks."""
    yield from _check_family(config)
    model, tensor = config.model, config.parallel.tensor
    if model.num_attention_heads % model.num_query_groups:
        yield UserError(
            f"model.num_query_groups = {model.num_query_groups}",
            f"does not divide model.num_attention_heads = {model.num_attention_heads}",
            "Give a divisor of the number of heads.",
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield UserError(
            f"model.rope_scaling.high_freq_factor = {scaling.high_freq_factor}",
            f"is not above low_freq_factor = {scaling.low_freq_factor}",
            "Llama 3 has 4 and 1.",
        )
    if model.head_dim % 2:
        yield UserError(
            f"model.head_dim = {model.head_dim}",
            "is odd, and RoPE rotates pairs",
            "Give an even head size.",
        )
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % tensor:
            yield UserError(
                f"model.{name} = {value}",
                f"is not divisible by parallel.tensor = {tensor}",
                f"Choose a tensor-parallel size that divides {value}.",
            )
    if model.num_query_groups % tensor and tensor % model.num_query_groups:
        yield UserError(
            f"model.num_query_groups = {model.num_query_groups}",
            f"neither divides parallel.tensor = {tensor} nor is divided by it",
            "Choose a tensor-parallel size that divides it, or a multiple of it.",
        )
    if model.padded_vocab_size % tensor:
        yield UserError(
            f"model.vocab_size = {model.vocab_size}",
            f"padded to {model.padded_vocab_size} it is not divisible by "
            f"parallel.tensor = {tensor}",
            f"Set model.vocab_padding_multiple to a multiple of {tensor}, e.g. 128.",
        )


def _check_family(config: RunConfig) -> Iterator[UserError]:
    """Each family has its own parts: a folder that claims another would be read without them."""
    model = config.model
    parts = {"qkv_bias": model.hf_family == "qwen2", "qk_norm": model.hf_family == "qwen3"}
    for key, expected in parts.items():
        found = getattr(model, key)
        if found != expected:
            has = "has" if expected else "does not have"
            yield UserError(
                f"model.{key} = {str(found).lower()}",
                f"the family {model.hf_family} {has} it",
                f"Set model.{key}={str(expected).lower()}, or another model.family.",
            )
