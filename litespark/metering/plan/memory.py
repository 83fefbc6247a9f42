"""Bytes on one GPU, by part, at the moment of a step at which they are the most.

The parts that last through the run are exact: weights, gradients (fp32 sums), optimizer state (fp32
masters and two moments, split over the data-parallel ranks).  Activations come and go; the peak is
where the last pipeline stage ends its forward pass, or where the backward pass of the last layer
begins, with all micro-batches of the pipeline in flight.

What is predicted is the peak of torch's allocator, as `memory_bytes` of the metrics is.  Beside it
on the GPU are the CUDA context, NCCL's buffers and what the allocator cannot use for its cuts: the
margin that decides whether a layout fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from litespark.config.schema import RunConfig
from litespark.metering.plan.activations import (
    RankShape,
    backend_of,
    fp8_layers,
    head_bytes,
    layer_bytes,
    uses_fp8,
)
from litespark.metering.plan.parameters import (
    holds_head,
    layer_matrices,
    layers_of_chunk,
    model_elements,
)

_MASTER = 4  # bytes of an fp32 master, moment or gradient sum
_WORKSPACES = 64 * 2**20  # cuBLAS' and cuBLASLt's, from torch's allocator
_CONTEXT = 700 * 2**20  # CUDA context and kernels, outside of the allocator
_PER_COMMUNICATOR = 300 * 2**20  # NCCL's buffers, a group of ranks
_FRAGMENTATION = 0.03  # of what comes and goes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank; `activations` are those of all micro-batches in flight.

    `outside` lies on the GPU but not in torch's allocator, `fragmentation` is what its cuts waste.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    fp8_copies: int
    activations: int
    temporary: int
    activations_per_layer: int
    micro_batches_in_flight: float
    fragmentation: int
    outside: int

    @property
    def peak(self) -> int:
        """What torch's allocator has handed out at the most."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.fp8_copies
            + self.activations
            + self.temporary
        )

    @property
    def needed(self) -> int:
        """What the GPU must have."""
        return self.peak + self.fragmentation + self.outside

    def as_record(self) -> dict[str, float]:
        """All parts and both sums, for JSON."""
        return {**asdict(self), "peak": self.peak, "needed": self.needed}


def model_bytes(config: RunConfig, world_size: int, stage: int, shard: int = 0) -> dict[str, int]:
    """Exact bytes of weights, gradients and optimizer state on one rank.

    `stage` and `shard` as in `parameters.model_elements`.
    """
    elements = model_elements(config, world_size, stage, shard)
    is_single = config.precision.mode == "fp32"
    return {
        "weights": elements.buffer * (4 if is_single else 2) - elements.fp8_buffer,
        "gradients": elements.buffer * _MASTER,
        # In fp32 the weights are their own masters.
        "optimizer": elements.owned * _MASTER * (2 if is_single else 3),
    }


def memory_plan(config: RunConfig, world_size: int) -> MemoryPlan:
    """The rank that needs the most: one of the first pipeline stage or of the last."""
    stages = {0, config.parallel.pipeline - 1}
    return max((_of_stage(config, world_size, stage) for stage in stages), key=lambda m: m.needed)


def in_flight(config: RunConfig, world_size: int, stage: int) -> float:
    """Micro-batches of one stage that wait for their backward pass at the most, in whole stages.

    Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2; the interleaved schedule's
    warm-up is megatron-core's (`pipeline_parallel/schedules.py`).
    """
    parallel = config.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    count = config.num_micro_batches(world_size) or 1
    if chunks == 1:
        return min(count, stages - stage)
    warmup = (stages - stage - 1) * 2 + (chunks - 1) * stages
    return min(count * chunks, warmup + 1) / chunks


def _of_stage(config: RunConfig, world_size: int, stage: int) -> MemoryPlan:
    waiting = in_flight(config, world_size, stage)
    in_fp8, in_all, last = _layers(config, stage)
    kept = {
        fp8: layer_bytes(config, fp8=fp8).kept * count
        for fp8, count in ((True, in_fp8), (False, in_all - in_fp8))
        if count
    }
    temporary = _temporary(config, uses_fp8(config, last), stage)
    activations = int(sum(kept.values()) * waiting)
    return MemoryPlan(
        stage=stage,
        **model_bytes(config, world_size, stage),
        fp8_copies=_fp8_copies(config, in_fp8),
        activations=activations,
        temporary=temporary,
        activations_per_layer=layer_bytes(config, fp8=uses_fp8(config, last)).kept,
        micro_batches_in_flight=waiting,
        fragmentation=int(_FRAGMENTATION * (activations + temporary)),
        outside=_CONTEXT + _PER_COMMUNICATOR * _communicators(config, world_size),
    )


def _layers(config: RunConfig, stage: int) -> tuple[int, int, int]:
    """Layers of a stage in FP8, in all, and the number of the last."""
    chunks = [
        layers_of_chunk(config.model, config.parallel, stage, chunk)
        for chunk in range(config.parallel.virtual_pipeline)
    ]
    in_fp8 = sum(fp8_layers(config, layers) for layers in chunks)
    return in_fp8, sum(map(len, chunks)), chunks[-1][-1]


def _fp8_copies(config: RunConfig, layers: int) -> int:
    """Every matrix of an FP8 layer in both orientations, made once a step.

    Of weights that exist in FP8 alone only the transpose is made.
    """
    if backend_of(config) == "reference":
        return 0
    matrices = sum(layer_matrices(config.model, config.parallel.tensor).values())
    scales = 4 / 128**2 if config.precision.recipe == "blockwise" else 0
    orientations = 1 if config.precision.primary_weights == "fp8" else 2
    return int(layers * matrices * orientations * (1 + scales))


def _temporary(config: RunConfig, last_is_fp8: bool, stage: int) -> int:
    """Workspaces, the rotary tables, and the most that any pass holds beside what is kept."""
    parallel, shape = config.parallel, RankShape.of(config)
    layer = layer_bytes(config, fp8=last_is_fp8)
    whole = layer_bytes(config, fp8=last_is_fp8, recompute="none")
    beside = layer.backward_peak
    if config.training.recompute == "full":  # the layer's own activations are there once more
        beside += whole.kept
    elif config.training.recompute == "selective":
        beside = max(beside, whole.attention_output)
    if holds_head(parallel, stage, parallel.virtual_pipeline - 1):
        head = head_bytes(config)
        beside = max(beside, head.forward_peak, head.backward_peak)
    # What arrives from the stages beside this one, and what is being sent.
    buffers = 4 * layer.input if parallel.pipeline > 1 else 0
    angles = 3 * 4 * config.data.sequence_length * config.model.head_dim // 2
    tokens = 4 * 8 * shape.tokens  # ids, labels, positions and the mask
    return beside + buffers + angles + tokens + _WORKSPACES


def _communicators(config: RunConfig, world_size: int) -> int:
    parallel = config.parallel
    data = config.data_parallel_size(world_size)
    degrees = (parallel.tensor, parallel.pipeline, parallel.context, data * parallel.context)
    return sum(degree > 1 for degree in degrees)
