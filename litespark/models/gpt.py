"""Litespark's GPT: megatron-core's, with Llama 3's RoPE scaling, document masks, a safe loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from litespark.config.model import ModelConfig, RopeScalingConfig
from litespark.models.backends import Backend
from litespark.modules.parameter_hooks import run_forward_pre_hooks
from litespark.ops.linear_cross_entropy import VocabularyShard, linear_cross_entropy
from litespark.ops.token_cross_entropy import token_cross_entropy


class GPT(GPTModel):
    """The part of a Llama that one rank holds of one model chunk.

    Args:
        config: megatron-core's configuration.
        block: the layers and the final norm.
        model: the shape.
        backend: who computes the layers, and the number formats they use.
        virtual_stage: number of the chunk under the interleaved schedule, else None.
        pre_process: holds the embedding.
        post_process: holds the final norm, LM head and loss.
        groups: the process groups of this rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        model: ModelConfig,
        backend: Backend,
        *,
        virtual_stage: int | None,
        pre_process: bool,
        post_process: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block,  # type: ignore[arg-type] - a block is taken as well
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.longest_exact_sequence,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,  # type: ignore[arg-type] - used as a float
            vp_stage=virtual_stage,
            pg_collection=groups,
        )
        self.num_real_tokens = model.vocab_size
        self.backend = backend
        self.policy = backend.policy
        if model.rope_scaling is not None:
            # megatron-core fixes all of Llama 3's constants but the factor.
            rotary: Any = self.rotary_pos_emb
            rotary.inv_freq = scale_rope_frequencies(rotary.inv_freq, model.rope_scaling)

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's embeddings; with document masks, the angles of each token's own position.

        A document's angles do not depend on where it stands: rotary table [t, 1, 1, d] from
        position_ids [1, t], those of this context-parallel rank's tokens.
        """
        if kwargs.get("packed_seq_params") is None:
            return _differentiable(super()._preprocess(*args, **kwargs))
        positions_t = kwargs["position_ids"][0]
        # The table is whole on every rank and has the same length for every batch: megatron-core
        # makes that one for a packing whose longest document has that length.
        length = positions_t.size(0) * self.config.context_parallel_size
        kwargs["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd", max_seqlen_q=length, max_seqlen_kv=length
        )
        parts = _differentiable(super()._preprocess(*args, **kwargs))
        hidden, rotary_s11d, *others = parts
        return hidden, rotary_s11d[positions_t], *others

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, labels: Any, loss_mask: Any, **kwargs: Any
    ) -> Tensor:
        """What the last stage returns.

        Logits [b, s, v] without labels; each token's loss, fp32 [b, s], with labels alone; and,
        given a mask, fp32 [b, s], also the sum of mask * loss, fp32 [].
        """
        if not self.post_process or labels is None:
            return super()._postprocess(
                hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs
            )
        if self.backend.fused_head:
            return self._fused_losses(hidden_states, labels, loss_mask)
        losses_bs = super()._postprocess(
            hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs
        )
        return losses_bs if loss_mask is None else (losses_bs.float() * loss_mask).sum()

    def _fused_losses(
        self, hidden_sbh: Tensor, labels_bs: Tensor, mask_bs: Tensor | None
    ) -> Tensor:
        """Losses by token or, given a mask, their sum; no logits of more than a chunk of tokens."""
        group: Any = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_sbh = gather_from_sequence_parallel_region(hidden_sbh, group=group)
        else:
            hidden_sbh = copy_to_tensor_model_parallel_region(hidden_sbh, group=group)
        run_forward_pre_hooks(self.output_layer)
        weight_vh: Any = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        inputs = (hidden_sbh.flatten(0, 1), weight_vh, labels_bs.t().flatten())
        shard = self._vocabulary_shard(weight_vh.size(0))
        if mask_bs is None:
            losses_m = token_cross_entropy(*inputs, shard)
            return losses_m.view(labels_bs.size(1), -1).t()
        loss_sum, _ = linear_cross_entropy(*inputs, mask_bs.t().flatten(), shard)
        return loss_sum

    def _vocabulary_shard(self, num_rows: int) -> VocabularyShard:
        group: Any = self.pg_collection.tp
        first = group.rank() * num_rows
        num_real = min(max(self.num_real_tokens - first, 0), num_rows)
        return VocabularyShard(first_token=first, num_real=num_real, group=group)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each token, fp32 [b, s]; padding columns take no probability.

        Without this an exported model, which has no padding, would have another loss.
        """
        return super().compute_language_model_loss(labels, self.mask_padding(logits))

    def mask_padding(self, logits_sbv: Tensor) -> Tensor:
        """The vocabulary-parallel logits [s, b, v_local] with padding columns at -inf."""
        local = logits_sbv.size(-1)
        num_real = self._vocabulary_shard(local).num_real
        if num_real == local:
            return logits_sbv
        is_padding_v = torch.arange(local, device=logits_sbv.device) >= num_real
        return logits_sbv.masked_fill(is_padding_v, float("-inf"))


def _differentiable(parts: Any) -> Any:
    """Let a frozen embedding's output have a gradient: recomputed layers have none without it."""
    hidden: Tensor | None = parts[0]
    if hidden is not None and torch.is_grad_enabled() and hidden.is_leaf:
        hidden.requires_grad_()
    return parts


def scale_rope_frequencies(inv_freq: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Llama 3's frequency scaling: long waves are slowed by `factor`, short ones kept.

    Between the two limits the scale is interpolated; fp32 [d/2].
    Source: `apply_scaling` of meta-llama/llama-models, models/llama3/model.py.
    """
    original = scaling.original_max_sequence_length
    wavelength = 2 * math.pi / inv_freq
    # 1 where waves are short enough to be kept, 0 where they are fully slowed.
    kept = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / scaling.factor + kept * inv_freq
