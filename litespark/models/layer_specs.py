"""The specification of one pipeline stage's transformer block, slot by slot.

Names of submodules and checkpoint keys are megatron-core's own, with the norms' keys mapped into
the linear that follows them, as Transformer Engine's fused modules store them: a checkpoint does
not depend on the backend that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from litespark.models.backends import Backend


def layer_spec(backend: Backend) -> ModuleSpec:
    """One Llama layer: norm, attention, residual, norm, SwiGLU, residual."""
    norm, normed_linear = backend.normed_linear()
    head_norm = backend.head_norm()
    attention = ModuleSpec(
        module=backend.self_attention(),
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=normed_linear,
            core_attention=ModuleSpec(
                module=backend.core_attention(), params=backend.core_attention_arguments()
            ),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(
        module=backend.mlp(),
        submodules=MLPSubmodules(
            linear_fc1=normed_linear,
            linear_fc2=backend.row_parallel_linear(),
        ),
    )
    return ModuleSpec(
        module=backend.layer(),
        params=backend.layer_arguments(),
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type] - called, not built
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            # Without effect where the linear holds the norm: its own keys are these.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(
    backend: Backend, config: TransformerConfig, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers this rank builds for one model chunk, and the final norm."""
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(backend)] * num_layers,
        layer_norm=backend.layer_norm(rms_norm=True),  # type: ignore[arg-type] - a class
    )


def slot_table(backend: Backend) -> Iterator[tuple[str, str]]:
    """Every slot with the class that fills it, for the table printed at start-up."""
    yield "layer", backend.layer().__name__
    yield "self_attention", backend.self_attention().__name__
    yield "mlp", backend.mlp().__name__
    norm, normed_linear = backend.normed_linear()
    yield "input_layernorm, pre_mlp_layernorm", norm.__name__
    yield "linear_qkv, linear_fc1", normed_linear.__name__
    yield "q_layernorm, k_layernorm", backend.head_norm().__name__
    yield "core_attention", backend.core_attention().__name__
    yield "linear_proj, linear_fc2", backend.row_parallel_linear().__name__
    yield "final_layernorm", backend.layer_norm(rms_norm=True).__name__
