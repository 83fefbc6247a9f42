"""Seconds of one step, by part, from a GPU's rates and the network's.

The slowest pipeline stage sets the pace: its forward and backward passes for each micro-batch, or
its host where that takes longer to launch them, the bubble at both ends of the pipeline, what of
the communication is not hidden behind computation, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from litespark.config.schema import RunConfig
from litespark.metering.plan.activations import backend_of, fp8_layers
from litespark.metering.plan.calibration import Calibration
from litespark.metering.plan.communication import (
    Network,
    context_seconds,
    data_seconds,
    pipeline_seconds,
    tensor_seconds,
)
from litespark.metering.plan.launches import launches
from litespark.metering.plan.parameters import layers_of_chunk, model_elements
from litespark.metering.plan.work import (
    OPTIMIZER_BYTES,
    WEIGHT_COPY_BYTES,
    ZERO_BYTES,
    Product,
    Work,
    head_work,
    layer_work,
)

_PEAK_FLOPS = 1e12


@dataclass(frozen=True)
class Pass:
    """Seconds of a part of the model for one micro-batch; `gaps` is time without a kernel."""

    products: float = 0.0
    attention: float = 0.0
    between: float = 0.0
    gaps: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())

    def __add__(self, other: Pass) -> Pass:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Pass(*(mine + others for mine, others in pairs))

    def times(self, factor: float) -> Pass:
        """So many of it."""
        return Pass(*(seconds * factor for seconds in vars(self).values()))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on a pipeline stage, by what they go to.

    `host` is the wait for a host that launches more slowly than the GPU computes, `recompute` is
    work that is done twice, `tensor`, `context`, `data` and `transfer` (between stages) are
    communication that nothing hides, `bubble` is a pipeline that fills and empties, and the wait of
    other stages for the one with the LM head.
    """

    products: float
    attention: float
    between: float
    gaps: float
    host: float
    recompute: float
    tensor: float
    context: float
    transfer: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(vars(self).values())

    @property
    def waiting(self) -> float:
        """Time in which the GPU computes nothing."""
        messages = self.tensor + self.context + self.transfer + self.data
        return self.gaps + self.host + messages + self.bubble

    def as_record(self) -> dict[str, float]:
        """The parts and their sum, for JSON."""
        return {**asdict(self), "total": self.total}


def step_time(
    config: RunConfig, world_size: int, calibration: Calibration, network: Network
) -> StepTime:
    """The step of a valid configuration; see `litespark.config.validate`."""
    parallel = config.parallel
    count = config.num_micro_batches(world_size) or 1
    passes = _stage_passes(config, calibration, network)
    head = _head_passes(config, calibration)
    forward, backward = passes.forward + head.forward, passes.backward + head.backward
    # Every stage has the same layers; the last has the head as well, and the others wait for it.
    uneven = (head.forward.total + head.backward.total) * (1 - 1 / parallel.pipeline)
    all_passes = (passes.forward + passes.backward).times(count)
    all_passes += (head.forward + head.backward).times(count / parallel.pipeline)
    again = passes.again.times(count)
    transfer = pipeline_seconds(config, network) * count
    computed = (forward + backward).total * count + again.total
    optimizer = _optimizer_seconds(config, world_size, calibration)
    launched = _host_seconds(config, calibration, count)
    host = max(0.0, launched - computed - optimizer)
    slowest = computed + host + transfer
    bubble = slowest * (parallel.pipeline - 1) / (parallel.virtual_pipeline * count)
    return StepTime(
        products=all_passes.products,
        attention=all_passes.attention,
        between=all_passes.between,
        gaps=all_passes.gaps + again.gaps,
        host=host,
        recompute=again.total - again.gaps - again.tensor - again.context,
        tensor=all_passes.tensor + again.tensor,
        context=all_passes.context + again.context,
        transfer=transfer,
        bubble=bubble + uneven * count,
        data=data_seconds(config, world_size, network, forward.total + backward.total),
        optimizer=optimizer,
    )


def _host_seconds(config: RunConfig, calibration: Calibration, count: int) -> float:
    """What a rank's host takes to launch a step of `count` micro-batches, on the first stage."""
    chunks = range(config.parallel.virtual_pipeline)
    held = [layers_of_chunk(config.model, config.parallel, 0, chunk) for chunk in chunks]
    return (calibration.host_seconds_per_launch or 0.0) * launches(config, held, count)


@dataclass(frozen=True)
class _Passes:
    """Forward, backward and recomputed forward of a part for one micro-batch."""

    forward: Pass
    backward: Pass
    again: Pass


def _stage_passes(config: RunConfig, calibration: Calibration, network: Network) -> _Passes:
    """The layers of the first stage; those of the others are as many."""
    model, parallel, recompute = config.model, config.parallel, config.training.recompute
    forward, backward, again = Pass(), Pass(), Pass()
    chunks = range(parallel.virtual_pipeline)
    held = [layers_of_chunk(model, parallel, 0, chunk) for chunk in chunks]
    in_fp8 = sum(fp8_layers(config, layers) for layers in held)
    for fp8, count in ((True, in_fp8), (False, sum(map(len, held)) - in_fp8)):
        if not count:
            continue
        ahead, back = layer_passes(config, layer_work(config, fp8=fp8), calibration)
        tensor = tensor_seconds(config, network, fp8=fp8)
        exchange = context_seconds(config, network)
        ahead = replace(ahead, tensor=tensor.forward, context=exchange.forward)
        back = replace(back, tensor=tensor.backward, context=exchange.backward)
        forward, backward = forward + ahead.times(count), backward + back.times(count)
        if recompute == "full":
            again += ahead.times(count)
        elif recompute == "selective":
            again += Pass(attention=ahead.attention, context=ahead.context).times(count)
    return _Passes(forward, backward, again)


def _head_passes(config: RunConfig, calibration: Calibration) -> _Passes:
    ahead, back = layer_passes(config, head_work(config), calibration, is_head=True)
    return _Passes(ahead, back, Pass())


def layer_passes(
    config: RunConfig, work: Work, calibration: Calibration, *, is_head: bool = False
) -> tuple[Pass, Pass]:
    """Forward and backward of a layer, or of the head, without communication."""
    share = calibration.attention_forward_share
    attention = calibration.attention_seconds(
        work.attention_flops, config.model.head_dim, config.data.sequence_length
    )
    precision = "fp8" if work.forward[0].precision == "fp8" else "bf16"
    speed = calibration.copy_bytes_per_second * calibration.memory_share.get(
        precision, min(calibration.memory_share.values())
    )
    gaps = 0.0 if is_head else calibration.gap_seconds_per_layer
    ahead = Pass(
        products=_seconds(work.forward, calibration),
        attention=attention * share,
        between=work.forward_bytes / speed,
        gaps=gaps / 3,
    )
    back = Pass(
        products=_seconds(work.backward, calibration),
        attention=attention * (1 - share),
        between=work.backward_bytes / speed,
        gaps=gaps * 2 / 3,
    )
    return ahead, back


def product_seconds(product: Product, calibration: Calibration) -> float:
    """One product: bound by its FLOPs or by its bytes, and a tail in which it fills no GPU."""
    rates = calibration.product_tflops
    rate = rates.get(product.precision, rates["bf16"]) * _PEAK_FLOPS
    bound = max(product.flops / rate, product.bytes / calibration.copy_bytes_per_second)
    return bound + calibration.product_overhead_seconds


def _seconds(products: Iterable[Product], calibration: Calibration) -> float:
    return sum(product_seconds(product, calibration) for product in products)


def _optimizer_seconds(config: RunConfig, world_size: int, calibration: Calibration) -> float:
    """Norm, AdamW on what the rank owns, gradients set to zero, weights quantised again."""
    elements = model_elements(config, world_size, 0)
    update = OPTIMIZER_BYTES * elements.owned / calibration.optimizer_bytes_per_second
    other = ZERO_BYTES * elements.buffer
    if config.precision.mode == "fp8" and backend_of(config) == "triton":
        other += WEIGHT_COPY_BYTES * elements.layer_matrices
    return update + other / calibration.copy_bytes_per_second
