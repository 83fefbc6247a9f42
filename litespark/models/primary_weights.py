"""Which weights of a model exist in FP8 alone, and their place in megatron-core's buffers.

megatron-core's DDP puts parameters of each dtype into flat buffers of their own, so that E4M3
parameters get theirs, of a byte an element, with fp32 gradients like all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from litespark.fp8.primary import PrimaryWeights
from litespark.models.gpt import GPT
from litespark.modules.fused_layer import FusedTransformerLayer
from litespark.modules.parallel_linears import weight_of
from litespark.ops.formats import E4M3


def keep_weights_in_fp8(chunks: Sequence[GPT]) -> None:
    """Let the weights of FP8 linears of this rank's chunks exist in FP8 alone, before DDP."""
    policy = chunks[0].policy
    named = dict(pair for chunk in chunks for pair in _fp8_weights(chunk))
    policy.primary = PrimaryWeights(named)


def _fp8_weights(chunk: GPT) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights of FP8 linears, named after the layer's number in the whole model, from 0."""
    for layer in chunk.decoder.layers:
        if not isinstance(layer, FusedTransformerLayer):
            continue
        if not chunk.policy.uses_fp8(layer.layer_number):
            continue
        for block in (layer.self_attention, layer.mlp):
            for name, linear in block.named_children():
                if name.startswith("linear_"):
                    yield f"layers.{layer.layer_number - 1}.{name}.weight", weight_of(linear)


def gather_fp8_as_bytes(chunk: DistributedDataParallel) -> None:
    """Let data-parallel ranks exchange FP8 weights as bytes: collectives know no FP8 everywhere.

    Where there are FP8 buckets and others, the gathering of each kind asks for the next of its own:
    megatron-core asks in the order of its buffers, which is that of the layers only within one.
    """
    kinds = set()
    buffers: Any = chunk.buffers  # not the method of torch's modules, which the name hides
    for buffer in buffers:
        for bucket in buffer.buckets:
            if buffer.param_dtype == E4M3 and bucket.param_data is not None:
                bucket.param_data = bucket.param_data.view(torch.uint8)
        kinds.add(buffer.param_dtype)
    for group in chunk.bucket_groups if len(kinds) > 1 else ():
        following = group.next_param_gather_bucket_group
        if following is not None and _is_fp8(following) != _is_fp8(group):
            group.next_param_gather_bucket_group = None


def _is_fp8(group: object) -> bool:
    """Whether the first bucket of a group holds FP8 weights."""
    return group.buckets[0].params_list[0].dtype == E4M3  # type: ignore[attr-defined]
