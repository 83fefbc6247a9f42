"""The fused transformer layer: two blocks, and nothing between them.

Parameters, their names and checkpoint keys are those of megatron-core's layer, which is also what
computes where the blocks do not apply: decoding with a key/value cache.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.fp8.policy import LayerFormats, PrecisionPolicy
from litespark.modules.fused_attention import FusedSelfAttention
from litespark.modules.fused_mlp import FusedMLP
from litespark.modules.parallel_linears import weight_of
from litespark.modules.parameter_hooks import run_forward_pre_hooks


class FusedTransformerLayer(TransformerLayer):
    """One layer of a Llama on the fused blocks.

    Args:
        policy: the number formats of the model's layers.
        The others are megatron-core's.
    """

    self_attention: FusedSelfAttention
    mlp: FusedMLP

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        policy: PrecisionPolicy,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.policy = policy
        self.refreshed_version: int | None = None  # of the weights that FP8 copies are of
        self.use_formats(policy.formats(self.layer_number))

    def use_formats(self, formats: LayerFormats) -> None:
        """Compute in these formats from the next micro-batch on."""
        self.self_attention.formats = self.mlp.formats = formats
        self.refreshed_version = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The layer's output [s, b, h] and no context; arguments as of megatron-core's layer."""
        if kwargs.get("inference_context") is not None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[return-value]
        self._take_over_weights()
        rotary_s11d = kwargs.get("rotary_pos_emb")
        if args[1:] or not isinstance(rotary_s11d, Tensor):
            raise LitesparkError("the fused layer takes rotary_pos_emb by name, as one tensor")
        cos_sr, sin_sr = _cos_sin(rotary_s11d)
        attention_sbh, x_sbh = self.self_attention.attend(
            hidden_states,
            weight_of(self.input_layernorm),
            cos_sr,
            sin_sr,
            kwargs.get("packed_seq_params"),
        )
        output_sbh = self.mlp.add_to(x_sbh, attention_sbh, weight_of(self.pre_mlp_layernorm))
        # Pipeline stages free what they have sent, which a view would keep alive.
        output_sbh = make_viewless_tensor(
            inp=output_sbh, requires_grad=output_sbh.requires_grad, keep_graph=True
        )
        return output_sbh, None

    def _take_over_weights(self) -> None:
        """Wait for weights that are still being gathered; quantise them once a step."""
        run_forward_pre_hooks(
            self.input_layernorm,
            self.self_attention.linear_qkv,
            self.self_attention.linear_proj,
            self.pre_mlp_layernorm,
            self.mlp.linear_fc1,
            self.mlp.linear_fc2,
        )
        if self.refreshed_version != self.policy.weights_version:
            self.self_attention.refresh()
            self.mlp.refresh()
            self.refreshed_version = self.policy.weights_version


def _cos_sin(rotary_s11d: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, fp32 [s, d/2], kept on the tensor: all layers share it."""
    found = getattr(rotary_s11d, "cos_sin_sr", None)
    if found is None:
        # Training may need what inference made first, and could not keep it for backward.
        with torch.inference_mode(False):
            # Both halves of a head turn by the same angles.
            angles_sr = rotary_s11d[:, 0, 0, : rotary_s11d.size(-1) // 2].float()
            found = angles_sr.cos(), angles_sr.sin()
        rotary_s11d.cos_sin_sr = found  # type: ignore[attr-defined]
    return found
