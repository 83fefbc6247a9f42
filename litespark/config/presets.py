"""Known model shapes, by the name users type in `model.preset`.

The report's shapes are those of its tables (arXiv 2510.02483); the Llama shapes are those of the
`config.json` Meta published with each model.
"""

from __future__ import annotations

from typing import Any

_LLAMA_3_2_ROPE_SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_sequence_length": 8192,
}


def _shape(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    **other: Any,
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": ffn,
        **other,
    }


_LLAMA2 = {"vocab_size": 32000, "max_sequence_length": 4096}
_LLAMA3 = {"vocab_size": 128256, "max_sequence_length": 8192, "rope_theta": 500000.0}
_LLAMA3_2 = {
    "vocab_size": 128256,
    "max_sequence_length": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": _LLAMA_3_2_ROPE_SCALING,
    "tie_embeddings": True,
}

_QWEN2_5 = {
    "vocab_size": 151936,
    "max_sequence_length": 32768,
    "rope_theta": 1e6,
    "norm_epsilon": 1e-6,
    "qkv_bias": True,
}
_QWEN3 = {
    "vocab_size": 151936,
    "max_sequence_length": 40960,
    "rope_theta": 1e6,
    "norm_epsilon": 1e-6,
    "head_dim": 128,
    "qk_norm": True,
}
# Version 0.3, the first without a sliding window.
_MISTRAL = {
    "vocab_size": 32768,
    "max_sequence_length": 32768,
    "rope_theta": 1e6,
    "family": "mistral",
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _shape(4, 128, 4, 2, 384, vocab_size=2048, max_sequence_length=512),
    # The report's "3B" has 2.29 B parameters, its "30B" 32.5 B.
    "paper-3b": _shape(28, 2048, 16, 2, 11008, **_LLAMA2),
    "paper-30b": _shape(60, 6656, 64, 64, 17920, **_LLAMA2),
    "llama-160m": _shape(12, 768, 12, 12, 3072, vocab_size=32000, max_sequence_length=2048),
    "llama2-7b": _shape(32, 4096, 32, 32, 11008, **_LLAMA2),
    "llama2-13b": _shape(40, 5120, 40, 40, 13824, **_LLAMA2),
    "llama3-8b": _shape(32, 4096, 32, 8, 14336, **_LLAMA3),
    "llama3-70b": _shape(80, 8192, 64, 8, 28672, **_LLAMA3),
    "llama3.2-1b": _shape(16, 2048, 32, 8, 8192, **_LLAMA3_2),
    "llama3.2-3b": _shape(28, 3072, 24, 8, 8192, **_LLAMA3_2),
    "mistral-7b": _shape(32, 4096, 32, 8, 14336, **_MISTRAL),
    "qwen2.5-0.5b": _shape(24, 896, 14, 2, 4864, tie_embeddings=True, **_QWEN2_5),
    "qwen2.5-1.5b": _shape(28, 1536, 12, 2, 8960, tie_embeddings=True, **_QWEN2_5),
    "qwen3-0.6b": _shape(28, 1024, 16, 8, 3072, tie_embeddings=True, **_QWEN3),
    "qwen3-1.7b": _shape(28, 2048, 16, 8, 6144, tie_embeddings=True, **_QWEN3),
}
