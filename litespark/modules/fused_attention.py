"""Fused self-attention block: norm, QKV, RoPE | core attention | projection.

Two autograd functions around the core attention, which is a library's own:

    RMSNorm                    -> QKV's input, in FP8 both ways round
    QKV
    split into q, k, v and RoPE in one pass
    ( core attention )
    attention's output in FP8, both ways round, whatever its strides
    projection

In backward one kernel undoes RoPE, puts the gradients of q, k and v together and writes them in
FP8, and the norm's derivative adds the gradient that comes along the residual stream, which is why
the first function also returns its input: so the two gradients meet inside of it.

Shapes: s sequence (of this rank where split), b micro-batch, m = s b tokens of all tensor-parallel
ranks, h hidden, n query heads and g key/value heads of this rank, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litespark.fp8.linear import as_matrix, keep_for_weight_gradient
from litespark.fp8.policy import high_precision_formats
from litespark.modules.exchange import Exchange
from litespark.modules.fused_core_attention import FusedCoreAttention
from litespark.modules.parallel_linears import NormLinear, gathered_gradient, weight_of
from litespark.ops.quantize import quantize
from litespark.ops.rope import split_rope, split_rope_backward


class FusedSelfAttention(SelfAttention):
    """megatron-core's self-attention with its parameters and names, computed as fused functions."""

    core_attention: FusedCoreAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.formats = high_precision_formats()
        self.exchange = Exchange(
            self.pg_collection.tp, sequence_parallel=self.config.sequence_parallel
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights after an optimizer step."""
        self.formats.qkv.refresh(weight_of(self.linear_qkv))
        self.formats.proj.refresh(weight_of(self.linear_proj))

    def attend(
        self,
        x_sbh: Tensor,
        norm_weight_h: Tensor,
        cos_sr: Tensor,
        sin_sr: Tensor,
        packed_seq_params: PackedSeqParams | None,
    ) -> tuple[Tensor, Tensor]:
        """attention(norm(x)), [s, b, h], and x, whose gradient this block completes."""
        query, key, value, x_sbh = _QkvBlock.apply(
            x_sbh,
            norm_weight_h,
            weight_of(self.linear_qkv),
            cos_sr,
            sin_sr,
            self,
            torch.is_grad_enabled(),
        )
        if self.checkpoint_core_attention and torch.is_grad_enabled():
            context_sbnd = checkpoint(
                self.core_attention.attend,
                query,
                key,
                value,
                packed_seq_params,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            context_sbnd = self.core_attention.attend(query, key, value, packed_seq_params)
        output_sbh = _ProjectionBlock.apply(
            context_sbnd, weight_of(self.linear_proj), self, torch.is_grad_enabled()
        )
        return output_sbh, x_sbh


class _QkvBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_sbh: Tensor,
        norm_weight_h: Tensor,
        weight_nh: Tensor,
        cos_sr: Tensor,
        sin_sr: Tensor,
        block: FusedSelfAttention,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norm_qkv = NormLinear(block.formats.qkv, block.exchange, block.config.layernorm_epsilon)
        qkv_mw, saved = norm_qkv.forward(
            as_matrix(x_sbh), None, norm_weight_h, weight_nh, needs_gradient=needs_gradient
        )
        assert isinstance(qkv_mw, torch.Tensor)
        query, key, value = split_rope(
            qkv_mw.view(-1, x_sbh.size(1), qkv_mw.size(1)),
            cos_sr,
            sin_sr,
            num_groups=block.num_query_groups_per_partition,
            head_dim=block.hidden_size_per_attention_head,
        )
        if needs_gradient:
            ctx.norm_qkv, ctx.saved = norm_qkv, saved
            ctx.save_for_backward(norm_weight_h, weight_nh, cos_sr, sin_sr)
        return query, key, value, x_sbh

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        norm_weight_h, weight_nh, cos_sr, sin_sr = ctx.saved_tensors
        dquery, dkey, dvalue, dx_sbh = gradients
        linear = ctx.norm_qkv.linear
        point = linear.gradient_point()
        spec = point.spec() if point is not None else None
        amax = point.new_amax(dquery.device) if point is not None else None
        dqkv = split_rope_backward(dquery, dkey, dvalue, cos_sr, sin_sr, quantize=spec, amax=amax)
        if isinstance(dqkv, torch.Tensor):
            if point is not None:
                dqkv = quantize(dqkv, point.spec_for(dqkv, amax))
            else:
                dqkv = linear.gradient_operand(dqkv)
        dx_mh, dnorm_weight, dweight = ctx.norm_qkv.backward(
            dqkv, ctx.saved, norm_weight_h, weight_nh, as_matrix(dx_sbh)
        )
        ctx.saved = None
        return dx_mh.view(dx_sbh.shape), dnorm_weight, dweight, None, None, None, None


class _ProjectionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        context_sbnd: Tensor,
        weight_hk: Tensor,
        block: FusedSelfAttention,
        needs_gradient: bool,
    ) -> Tensor:
        linear, exchange = block.formats.proj, block.exchange
        operand = linear.input_operand(context_sbnd, columns=needs_gradient)
        output_mh = exchange.reduce(linear.forward(operand, weight_hk))
        if needs_gradient:
            ctx.linear, ctx.exchange, ctx.shape = linear, exchange, context_sbnd.shape
            ctx.operand = keep_for_weight_gradient(operand)
            ctx.save_for_backward(weight_hk)
        return output_mh.view(-1, context_sbnd.size(1), output_mh.size(1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight_hk,) = ctx.saved_tensors
        doutput = gathered_gradient(ctx.linear, ctx.exchange, as_matrix(gradients[0]))
        dcontext = ctx.linear.input_gradient(doutput, weight_hk).view(ctx.shape)
        dweight = ctx.linear.weight_gradient(doutput, ctx.operand, weight_hk)
        ctx.operand = None
        return dcontext, dweight, None, None
