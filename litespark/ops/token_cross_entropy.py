"""The LM head's cross-entropy of each token, differentiable, without the logits of all tokens.

`linear_cross_entropy` takes both gradients in its forward, because it knows the weight of each
token's loss beforehand.  A preference loss does not: the weight of a token depends on the sums over
its whole answer and over the answer it is compared with.  Here forward computes losses alone, chunk
by chunk, and backward computes the logits of each chunk again, now with the weights at hand.  That
costs one more product with the head, a third more than with known weights, and keeps nothing but
the hidden states; the logits of all tokens would be 2 v bytes a token, 64 KB at v = 32000.

Shapes: m tokens, h hidden size, v rows of this rank's weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litespark.ops.linear_cross_entropy import (
    VocabularyShard,
    check_head,
    check_tokens,
    losses_and_gradients,
)
from litespark.ops.weight_gradient import deliver_weight_gradient


def token_cross_entropy(
    hidden_mh: Tensor,
    weight_vh: Tensor,
    labels_m: Tensor,
    shard: VocabularyShard,
    *,
    chunk_tokens: int = 4096,
) -> Tensor:
    """Each token's loss, fp32 [m], differentiable with respect to `hidden` and `weight`.

    Arguments, gradients and what tensor parallelism asks of the caller are those of
    `linear_cross_entropy`, whose second result this is, with a gradient.

    Raises:
        LitesparkError: shapes, dtypes or strides that do not fit.
    """
    check_head(hidden_mh, weight_vh, chunk_tokens)
    check_tokens(hidden_mh, labels_m, None)
    return _TokenCrossEntropy.apply(hidden_mh, weight_vh, labels_m, shard, chunk_tokens)  # type: ignore[return-value] - one tensor


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_mh: Tensor,
        weight_vh: Tensor,
        labels_m: Tensor,
        shard: VocabularyShard,
        chunk_tokens: int,
    ) -> Tensor:
        weights_m = hidden_mh.new_ones(hidden_mh.size(0), dtype=torch.float32)
        losses_m, _, _ = losses_and_gradients(
            hidden_mh, weight_vh, labels_m, weights_m, shard, chunk_tokens, (False, False)
        )
        ctx.save_for_backward(hidden_mh, weight_vh, labels_m)
        ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
        return losses_m

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_mh, weight_vh, labels_m = ctx.saved_tensors
        weights_m = gradients[0].float().contiguous()
        _, dhidden_mh, dweight_vh = losses_and_gradients(
            hidden_mh,
            weight_vh,
            labels_m,
            weights_m,
            ctx.shard,
            ctx.chunk_tokens,
            ctx.needs_input_grad[:2],
        )
        if dweight_vh is not None:
            dweight_vh = deliver_weight_gradient(weight_vh, dweight_vh)
        return dhidden_mh, dweight_vh, None, None, None
