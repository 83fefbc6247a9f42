"""Litespark's configuration in megatron-core's words.

megatron-core's defaults are those of a 2019 GPT (dropout 0.1, biases, LayerNorm), and some
combinations give wrong numbers without an error; everything that matters is therefore written out
here, once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from litespark.config.schema import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}


def transformer_config(config: RunConfig) -> TransformerConfig:
    """megatron-core's configuration of the model and of its parallel execution."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.precision.mode]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        # Weights are drawn by `initialize.py`, so that they do not depend on the layout.
        # perform_initialization=False would also leave out the marks of sharded parameters.
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        use_cpu_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        # The loss is summed over tokens and divided once by the global number of tokens.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # With bf16 parameters the fused loss rounds its gradient to bf16: off, in all formats.
        cross_entropy_loss_fusion=False,
        **_pipeline_options(config),
        **_recompute_options(config),
        **_transformer_engine_options(config),
    )


def _leave_as_it_is(weight: Tensor) -> Tensor:
    return weight


def _pipeline_options(config: RunConfig) -> dict[str, Any]:
    """The interleaved schedule needs un-batched sends: with two stages both neighbours are one
    rank, and batched sends to and from it are matched in the wrong order (wrong loss, no error).
    """
    interleaved = config.parallel.virtual_pipeline > 1
    return {
        "virtual_pipeline_model_parallel_size": (
            config.parallel.virtual_pipeline if interleaved else None
        ),
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": True,
    }


def _recompute_options(config: RunConfig) -> dict[str, Any]:
    if config.training.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if config.training.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _transformer_engine_options(config: RunConfig) -> dict[str, Any]:
    """megatron-core drives Transformer Engine's FP8 itself; Litespark's blocks drive their own."""
    if config.model.backend != "te":
        return {"transformer_impl": "local"}
    options: dict[str, Any] = {"transformer_impl": "transformer_engine"}
    precision = config.precision
    if precision.mode == "fp8":
        first, last = precision.bf16_first_layers, precision.bf16_last_layers
        options |= {
            "fp8": "hybrid" if precision.recipe != "blockwise" else "e4m3",
            "fp8_recipe": precision.recipe,
            "fp8_margin": precision.margin,
            "fp8_amax_history_len": precision.amax_history_steps,
            "fp8_amax_compute_algo": "max",
            "first_last_layers_bf16": first + last > 0,
            "num_layers_at_start_in_bf16": first,
            "num_layers_at_end_in_bf16": last,
        }
    return options
