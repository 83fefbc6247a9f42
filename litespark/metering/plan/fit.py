"""A calibration from results of `litespark bench --json`, and the configuration of a result."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from litespark.config.presets import PRESETS
from litespark.config.schema import RunConfig
from litespark.errors import LitesparkError
from litespark.metering.plan.activations import uses_fp8
from litespark.metering.plan.calibration import AttentionRate, Calibration
from litespark.metering.plan.communication import NETWORKS
from litespark.metering.plan.launches import launches
from litespark.metering.plan.time import step_time
from litespark.metering.plan.work import (
    OPTIMIZER_BYTES,
    WEIGHT_COPY_BYTES,
    ZERO_BYTES,
    Work,
    head_work,
    layer_work,
)

Record = dict[str, Any]

_WAITING_WATTS = 300.0  # assumed: busy waiting of NCCL's kernels, between idle (110) and the cap
_LEAST_WATTS = 50.0  # no GPU that trains draws less
_LONG = 2**31 - 1


def config_of(record: Record) -> RunConfig:
    """The configuration that a result was measured with, as far as the planner asks."""
    preset = PRESETS.get(record["model"] or "", {})
    precision = {
        key: value
        for key, value in record["precision"].items()
        if key in ("mode", "recipe", "fc1_output", "primary_weights")
        and (key == "mode" or record["precision"]["mode"] == "fp8")
    }
    attention = record.get("attention", "auto")
    if "flash-attn-4" not in record.get("versions", {}) and attention == "auto":
        attention = "cudnn"
    samples = record["micro_batch"] * record["accumulate"]
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "not-written"},
            "model": {
                **record["shape"],
                "tie_embeddings": preset.get("tie_embeddings", False),
                "max_sequence_length": _LONG,
                "attention": attention,
            },
            "data": {
                "blend": [{"prefix": "random"}],
                "split": [100, 0, 0],
                "sequence_length": record["sequence_length"],
            },
            "batch": {"micro": record["micro_batch"], "global": samples},
            "precision": precision,
            "optimizer": {"lr": 1e-4},
            "training": {
                "steps": 1,
                "recompute": record.get("recompute", "none"),
                "cuda_graph": record.get("cuda_graph", False),
            },
        }
    )


@dataclass(frozen=True)
class Subject:
    """What was measured: the GPU, how much of it torch can allocate, how fast it copies, and who
    computed; `product_tflops` and `attention` are rates that are known beforehand.
    """

    gpu: str
    memory_gib: float
    copy_bytes_per_second: float
    source: str
    stack: str = "litespark"
    product_tflops: dict[str, float] = field(default_factory=dict)
    attention: tuple[AttentionRate, ...] = ()


def fit(records: Sequence[Record], subject: Subject) -> Calibration:
    """Rates from results of one GPU: first from breakdowns, then from what is left of whole steps.

    A result without a breakdown at a head size or length that no breakdown has tells the rate of
    attention there; a number format without a breakdown is given a memory share the same way.

    Raises:
        LitesparkError: no result with a breakdown, or no rate of BF16 products, which FP8 needs
            for its LM head.
    """
    by_format = sorted(records, key=lambda record: record["precision"]["mode"])  # bf16 first
    broken_down = [record for record in by_format if record.get("breakdown")]
    if not broken_down:
        raise LitesparkError("a calibration needs a result of `bench` with a breakdown")
    products = dict(subject.product_tflops)
    found: dict[str, defaultdict[Any, list[float]]] = {
        name: defaultdict(list) for name in ("attention", "share", "optimizer", "gap")
    }
    for record in broken_down:
        mode = record["precision"]["mode"]
        if mode not in products:
            products[mode] = _product_rate(record, products)
        _add_rates(found, record, subject.copy_bytes_per_second)
    watts: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.get("watts_per_gpu") is not None:
            watts[record["precision"]["mode"]].append(record["watts_per_gpu"])
    calibration = Calibration(
        gpu=subject.gpu,
        device=records[0]["device"],
        stack=subject.stack,
        source=subject.source,
        memory_gib=subject.memory_gib,
        copy_bytes_per_second=subject.copy_bytes_per_second,
        product_tflops=products,
        memory_share=_means(found["share"]),
        attention=_attention_rates(_known(subject.attention) | _means(found["attention"])),
        optimizer_bytes_per_second=statistics.fmean(found["optimizer"][None]),
        gap_seconds_per_layer=statistics.median(found["gap"][None]),
        busy_watts=_means(watts),
        waiting_watts=_WAITING_WATTS,
    )
    for record in by_format:
        if not record.get("breakdown"):
            calibration = _with_remainder(calibration, record)
    return calibration


def with_host(calibration: Calibration, record: Record) -> Calibration:
    """The calibration with what a step of a model too small for the GPU tells of its host.

    The fastest step counts: the others say what else the host did.
    """
    config = config_of(record)
    found = launches(config, [range(1, config.model.num_layers + 1)], record["accumulate"])
    update: dict[str, float] = {"host_seconds_per_launch": record["step_seconds"]["min"] / found}
    watts, seconds = record.get("watts_per_gpu"), record["step_seconds"]["median"]
    if watts is not None:
        alone = calibration.model_copy(update={"host_seconds_per_launch": None})
        computing = step_time(config, 1, alone, NETWORKS["infiniband"]).total
        busy = calibration.busy_watts[config.precision.mode]
        idle = (watts * seconds - busy * computing) / max(seconds - computing, 0.5 * seconds)
        update["idle_watts"] = max(idle, _LEAST_WATTS)
    return calibration.model_copy(update=update)


def _works(config: RunConfig) -> list[Work]:
    """All that one micro-batch does."""
    layers = range(1, config.model.num_layers + 1)
    return [*(layer_work(config, fp8=uses_fp8(config, n)) for n in layers), head_work(config)]


def _seconds_of_parts(record: Record) -> dict[str, float]:
    """Seconds of a step by part; the breakdown is in microseconds a token."""
    tokens = record["tokens_per_step"]
    parts = record["breakdown"]["parts_us_per_token"]
    return {name: value * tokens * 1e-6 for name, value in parts.items()}


def _product_rate(record: Record, known: dict[str, float]) -> float:
    """TFLOP/s of the products in the record's format; those of another format have a known rate."""
    config, mode = config_of(record), record["precision"]["mode"]
    seconds = _seconds_of_parts(record)["matrix products"] / record["accumulate"]
    flops = 0.0
    for product in (product for work in _works(config) for product in work.products):
        seconds -= Calibration.model_fields["product_overhead_seconds"].default
        if product.precision == mode:
            flops += product.flops
        elif product.precision in known:
            seconds -= product.flops / (known[product.precision] * 1e12)
        else:
            raise LitesparkError(f"{mode} needs a rate of products in {product.precision} first")
    return flops / seconds / 1e12


def _add_rates(found: dict[str, Any], record: Record, copy_bytes_per_second: float) -> None:
    """The rates that one breakdown tells beside that of the products."""
    config, parts, count = config_of(record), _seconds_of_parts(record), record["accumulate"]
    works = _works(config)
    key = (config.model.head_dim, config.data.sequence_length)
    flops = count * sum(work.attention_flops for work in works)
    found["attention"][key].append(flops / parts["attention"] / 1e12)
    moved = count * sum(work.forward_bytes + work.backward_bytes for work in works)
    moved += _bytes_per_step(config, record["parameters"])
    share = moved / parts["everything else"] / copy_bytes_per_second
    found["share"][config.precision.mode].append(share)
    found["optimizer"][None].append(OPTIMIZER_BYTES * record["parameters"] / parts["optimizer"])
    found["gap"][None].append(parts["idle"] / config.model.num_layers / count)


def _bytes_per_step(config: RunConfig, parameters: int) -> float:
    """What of `everything else` is done once a step: gradients set to zero, weights quantised."""
    copies = WEIGHT_COPY_BYTES if config.precision.mode == "fp8" else 0
    return parameters * (ZERO_BYTES + copies)


def _with_remainder(calibration: Calibration, record: Record) -> Calibration:
    """The calibration with what a whole step tells of a rate that it lacks."""
    config, mode = config_of(record), record["precision"]["mode"]
    step = step_time(config, 1, calibration, NETWORKS["infiniband"])
    left = record["step_seconds"]["median"] - step.total
    size, length = config.model.head_dim, config.data.sequence_length
    known = _known(calibration.attention)
    if mode not in calibration.memory_share:
        assumed = min(calibration.memory_share.values())
        share = assumed * step.between / max(step.between + left, 0.1 * step.between)
        return calibration.model_copy(
            update={"memory_share": calibration.memory_share | {mode: share}}
        )
    if (size, length) in known:
        return calibration
    flops = record["accumulate"] * sum(work.attention_flops for work in _works(config))
    known[size, length] = flops / max(step.attention + left, 0.1 * step.attention) / 1e12
    return calibration.model_copy(update={"attention": _attention_rates(known)})


def _known(rates: Sequence[AttentionRate]) -> dict[tuple[int, int], float]:
    return {(rate.head_dim, rate.sequence_length): rate.tflops for rate in rates}


def _attention_rates(rates: dict[tuple[int, int], float]) -> tuple[AttentionRate, ...]:
    return tuple(
        AttentionRate(head_dim=size, sequence_length=length, tflops=rate)
        for (size, length), rate in sorted(rates.items())
    )


def _means(values: dict[Any, list[float]]) -> dict[Any, float]:
    return {key: statistics.fmean(each) for key, each in values.items()}
