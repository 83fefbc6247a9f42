"""The `model` section: the shape of the model and who computes it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from litespark.config.presets import PRESETS
from litespark.config.section import Section


class RopeScalingConfig(Section):
    """Llama 3's scaling of the rotary frequencies for long sequences (Llama 3.1 `rope_scaling`)."""

    factor: float = Field(gt=0, description="How much longer the sequences become.")
    low_freq_factor: float = Field(
        default=1.0,
        gt=0,
        description="Wavelengths above original length / this are scaled by 1/factor.",
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, description="Wavelengths below original length / this are left alone."
    )
    original_max_sequence_length: int = Field(
        default=8192, ge=1, description="Sequence length of the unscaled model, in tokens."
    )


class ModelConfig(Section):
    """The shape of a Llama or a relative: RMSNorm, grouped-query attention with RoPE, SwiGLU."""

    preset: str | None = Field(
        default=None, description="A known shape; the keys beside it override single values of it."
    )
    num_layers: int = Field(ge=1, description="Transformer layers.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    ffn_hidden_size: int = Field(ge=1, description="Width of SwiGLU's gate and of its up branch.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_query_groups: int = Field(
        ge=1, description="Key/value heads (GQA); default: as many as query heads (MHA)."
    )
    head_dim: int = Field(
        ge=2, description="Size of one head; default: hidden_size / num_attention_heads."
    )
    vocab_size: int = Field(ge=1, description="Token ids of the model; at least the tokenizer's.")
    vocab_padding_multiple: int = Field(
        default=128,
        ge=1,
        description="Embedding and LM head rows are padded to a multiple of this, which every "
        "tensor-parallel size must divide; padding never takes probability and is not exported.",
    )
    max_sequence_length: int = Field(ge=1, description="Longest sequence, in tokens.")
    norm_epsilon: float = Field(
        default=1e-5, gt=0, description="Epsilon inside RMSNorm's square root."
    )
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScalingConfig | None = Field(
        default=None, description="Llama 3's scaling, or none."
    )
    tie_embeddings: bool = Field(
        default=False, description="LM head shares the embedding's weight."
    )
    qkv_bias: bool = Field(
        default=False, description="Query, key and value have biases, as in Qwen2 and Qwen2.5."
    )
    qk_norm: bool = Field(
        default=False,
        description="Each head's query and key pass an RMSNorm before RoPE, as in Qwen3.",
    )
    sliding_window: int | None = Field(
        default=None,
        ge=1,
        description="A token attends to this many tokens at most, itself included, as in the first "
        "Mistral. It is not computed: longer sequences are refused, for shorter ones it changes "
        "nothing. null: none.",
    )
    family: Literal["llama", "mistral", "qwen2", "qwen3"] | None = Field(
        default=None,
        description="Hugging Face's name for the architecture, written by exports; null: qwen3 "
        "with qk_norm, qwen2 with qkv_bias, else llama.",
    )
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="Standard deviation of the initial weights; the projections that write into "
        "the residual stream use init_std / sqrt(2 num_layers).",
    )
    backend: Literal["auto", "reference", "triton", "te"] = Field(
        default="auto",
        description="Who computes the layers: `reference` is plain torch on any device; `triton` "
        "is Litespark's fused blocks; `te` is Transformer Engine; `auto` takes the fastest that "
        "this machine and configuration can run.",
    )
    attention: Literal[
        "auto",
        "flash-cute",
        "flash3",
        "flash2",
        "cudnn",
        "sdpa-flash",
        "sdpa-efficient",
        "sdpa-math",
    ] = Field(
        default="auto",
        description="Library of the core attention of backend `triton`: FlashAttention 4 (CuTe), 3 "
        "or 2, cuDNN, or one of torch's kernels; `auto` measures those that are there at the first "
        "step and takes the fastest.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
            raise PydanticCustomError(
                "unknown_preset", "{preset}", {"preset": str(preset), "known": list(PRESETS)}
            )
        filled: dict[str, Any] = {**(PRESETS[preset] if preset else {}), **values}
        heads, hidden = filled.get("num_attention_heads"), filled.get("hidden_size")
        if filled.get("num_query_groups") is None and heads is not None:
            filled["num_query_groups"] = heads
        if filled.get("head_dim") is None and type(hidden) is int and type(heads) is int and heads:
            filled["head_dim"] = hidden // heads
        return filled

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the LM head, padding included."""
        multiple = self.vocab_padding_multiple
        return -(-self.vocab_size // multiple) * multiple

    @property
    def longest_exact_sequence(self) -> int:
        """Tokens up to which full attention is what the model was made for."""
        return min(self.max_sequence_length, self.sliding_window or self.max_sequence_length)

    @property
    def hf_family(self) -> str:
        """The family that an export writes."""
        if self.family is not None:
            return self.family
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"
