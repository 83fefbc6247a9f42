"""Which parameters a rank holds, and how megatron-core lays them out: exact, in elements.

A rank holds the layers of its pipeline stage, each matrix split over the tensor-parallel ranks.
megatron-core's DDP puts a chunk's parameters, last first, into one flat buffer for weights and one
for gradients.  With the distributed optimizer each parameter begins at a multiple of 64 elements,
and each bucket ends at a multiple of lcm(ranks, 128), so that it can be cut into equal shards; a
rank keeps optimizer state for what of its parameters lies in its own shard of each bucket.
Source: megatron-core 0.16, `distributed/param_and_grad_buffer.py` (`_ParamAndGradBuffer`) and
`distributed/distributed_data_parallel.py`; `tools/checks/plan_layouts.py` holds the figures of
twenty layouts against the real buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from litespark.config.schema import ModelConfig, ParallelConfig, RunConfig

_PARAMETER_ALIGNMENT = 64  # elements; with the distributed optimizer only
_BUCKET_ALIGNMENT = 128
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True)
class Parameter:
    """One weight of a rank; `has_own_bucket` as for an embedding that two stages share.

    `is_linear` is true of what `precision.primary_weights: fp8` keeps in FP8 alone.
    """

    name: str
    numel: int
    has_own_bucket: bool = False
    layer: int = 0
    is_linear: bool = False


@dataclass(frozen=True)
class Buffer:
    """The flat buffer of one model chunk: its elements, padding included, and what lies where.

    `spans` are the parameters' (start, end), `buckets` the buckets'.
    """

    numel: int
    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    def owned(self, shard: int, num_shards: int) -> int:
        """Elements of parameters in shard `shard` of each bucket."""
        total = position = 0
        for start, end in self.buckets:
            size = (end - start) // num_shards
            low = start + shard * size
            high = low + size
            while position < len(self.spans) and self.spans[position][0] < end:
                first, last = self.spans[position]
                total += max(0, min(last, high) - max(first, low))
                position += 1
        return total


@dataclass(frozen=True)
class ModelElements:
    """Elements that one rank stores, over all of its chunks.

    Weights that exist in FP8 alone are in buffers of their own: `fp8_buffer` of `buffer`.
    """

    parameters: int
    buffer: int
    fp8_buffer: int
    owned: int
    layer_matrices: int


def layers_of_chunk(model: ModelConfig, parallel: ParallelConfig, stage: int, chunk: int) -> range:
    """Numbers, from 1 over the whole model, of the layers in chunk `chunk` of stage `stage`."""
    count = model.num_layers // (parallel.pipeline * parallel.virtual_pipeline)
    first = (chunk * parallel.pipeline + stage) * count + 1
    return range(first, first + count)


def holds_embedding(stage: int, chunk: int) -> bool:
    """Whether a chunk begins the model."""
    return stage == 0 and chunk == 0


def holds_head(parallel: ParallelConfig, stage: int, chunk: int) -> bool:
    """Whether a chunk ends the model: final norm, LM head, loss."""
    return stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1


def layer_matrices(model: ModelConfig, tensor: int) -> dict[str, int]:
    """Elements of a layer's matrices on one tensor-parallel rank."""
    hidden, head = model.hidden_size, model.head_dim
    query, groups = model.num_attention_heads * head, model.num_query_groups * head
    return {
        "linear_proj": query * hidden // tensor,
        "linear_qkv": hidden * (query + 2 * groups) // tensor,
        "linear_fc1": 2 * hidden * model.ffn_hidden_size // tensor,
        "linear_fc2": model.ffn_hidden_size * hidden // tensor,
    }


def chunk_parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int, chunk: int
) -> Iterator[Parameter]:
    """The parameters of one chunk on one rank, in the order in which the modules hold them."""
    hidden = model.hidden_size
    table = model.padded_vocab_size * hidden // parallel.tensor
    is_split = parallel.pipeline > 1
    if holds_embedding(stage, chunk):
        yield Parameter("embedding", table, model.tie_embeddings and is_split)
    matrices = layer_matrices(model, parallel.tensor)

    def linear(layer: int, name: str) -> Parameter:
        return Parameter(f"{layer}.{name}", matrices[name], layer=layer, is_linear=True)

    for layer in layers_of_chunk(model, parallel, stage, chunk):
        yield Parameter(f"{layer}.input_layernorm", hidden)
        yield linear(layer, "linear_proj")
        yield linear(layer, "linear_qkv")
        if model.qkv_bias:
            yield Parameter(f"{layer}.linear_qkv.bias", matrices["linear_qkv"] // hidden)
        if model.qk_norm:
            yield Parameter(f"{layer}.q_layernorm", model.head_dim)
            yield Parameter(f"{layer}.k_layernorm", model.head_dim)
        yield Parameter(f"{layer}.pre_mlp_layernorm", hidden)
        yield linear(layer, "linear_fc1")
        yield linear(layer, "linear_fc2")
    if holds_head(parallel, stage, chunk):
        yield Parameter("final_layernorm", hidden)
        if not model.tie_embeddings or is_split:
            yield Parameter("output_layer", table, model.tie_embeddings)


def bucket_elements(
    parallel: ParallelConfig, num_shards: int, stage: int, chunk: int
) -> int | None:
    """Elements from which a bucket is closed; None: the chunk is one bucket."""
    if not parallel.overlap_grad_reduce or stage > 0 or chunk > 0:
        return None
    return max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * num_shards)


def lay_out(
    parameters: Sequence[Parameter], num_shards: int, bucket_size: int | None, *, sharded: bool
) -> Buffer:
    """megatron-core's buffer of these parameters; `sharded` with the distributed optimizer."""
    start_unit = _PARAMETER_ALIGNMENT if sharded else 1
    end_unit = math.lcm(num_shards, _BUCKET_ALIGNMENT) if sharded else 1
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = position = 0
    is_empty = True

    def close(end: int) -> int:
        nonlocal bucket_start, is_empty
        padded = _ceil(end, end_unit)
        buckets.append((bucket_start, padded))
        bucket_start, is_empty = padded, True
        return padded

    for parameter in reversed(parameters):
        position = _ceil(position, start_unit)
        alone = parameter.has_own_bucket and sharded
        if alone and not is_empty:
            position = close(position)
        end = position + parameter.numel
        spans.append((position, end))
        is_empty = False
        is_full = bucket_size is not None and end - bucket_start >= bucket_size
        position = close(end) if is_full or alone else end
    if not is_empty:
        position = close(position)
    return Buffer(position, tuple(spans), tuple(buckets))


def model_elements(config: RunConfig, world_size: int, stage: int, shard: int = 0) -> ModelElements:
    """What a rank of pipeline stage `stage` stores.

    Args:
        config: the run.
        world_size: processes in all.
        stage: pipeline stage of the rank.
        shard: its number among the ranks that share the optimizer's state: data rank x context
            size + context rank.
    """
    # Ranks that share optimizer state count whether they split the batch or the sequence, so
    # layouts that differ in that alone share the answer.
    parallel = config.parallel
    num_shards = config.data_parallel_size(world_size) * parallel.context
    alike = parallel.model_copy(update={"context": 1, "sequence": False})
    model: Any = config.model  # frozen sections have a hash, which their type does not tell
    sections: Any = alike
    return _elements(model, sections, num_shards, stage, shard, _layers_in_fp8_alone(config))


def _layers_in_fp8_alone(config: RunConfig) -> tuple[int, int]:
    """The first and the last layer, from 1, whose weights exist in FP8 alone; none: (1, 0)."""
    precision = config.precision
    if precision.mode != "fp8" or precision.primary_weights != "fp8":
        return 1, 0
    first = precision.bf16_first_layers + 1
    return first, config.model.num_layers - precision.bf16_last_layers


@lru_cache(maxsize=4096)
def _elements(
    model: ModelConfig,
    parallel: ParallelConfig,
    num_shards: int,
    stage: int,
    shard: int,
    in_fp8_alone: tuple[int, int],
) -> ModelElements:
    first, last = in_fp8_alone
    parameters = buffer = fp8_buffer = owned = matrices = 0
    sharded = parallel.distributed_optimizer
    for chunk in range(parallel.virtual_pipeline):
        held = list(chunk_parameters(model, parallel, stage, chunk))
        size = bucket_elements(parallel, num_shards, stage, chunk)
        in_fp8 = [p for p in held if p.is_linear and first <= p.layer <= last]
        others = [p for p in held if not (p.is_linear and first <= p.layer <= last)]
        for alike in (in_fp8, others):
            laid = lay_out(alike, num_shards, size, sharded=sharded)
            count = sum(parameter.numel for parameter in alike)
            parameters += count
            buffer += laid.numel
            fp8_buffer += laid.numel if alike is in_fp8 else 0
            owned += laid.owned(shard, num_shards) if sharded else count
        layers = len(layers_of_chunk(model, parallel, stage, chunk))
        matrices += layers * sum(layer_matrices(model, parallel.tensor).values())
    return ModelElements(parameters, buffer, fp8_buffer, owned, matrices)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
