"""A training step, measured: the same set-up and the same step as a run's, without its hooks.

The first step is timed apart: it compiles kernels and tries algorithms, and with the set-up before
it it is what a user waits for at every start.  The timed steps follow, then one step under the
profiler for the breakdown, which is never one of the timed ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import litespark
from litespark.config.schema import RunConfig
from litespark.config.validate import check_config
from litespark.data.blend import Blend
from litespark.data.loader import Batch
from litespark.errors import UserError
from litespark.metering.breakdown import break_down, record_kernels
from litespark.metering.energy import EnergyMeter
from litespark.metering.flops import total_parameters
from litespark.metering.measurement import (
    Record,
    Work,
    energy_check,
    figures,
    over_ranks,
    software,
    time_steps,
)
from litespark.metering.memory import peak_memory_bytes
from litespark.parallel.groups import gather_objects, stop_process_group
from litespark.training.agreement import on_all_ranks
from litespark.training.preflight import open_data
from litespark.training.reference import prepare_reference
from litespark.training.setup import batch_loader, build_run, start_processes
from litespark.training.state import TrainingRun
from litespark.training.step import attended_tokens, mean_loss, train_step

_GIBIBYTE = 2**30


@dataclass(frozen=True)
class BenchmarkOptions:
    """How to measure: warm-up steps (1 or more), timed steps, and what beside them.

    `reads_data` says that the configuration's blend is read; otherwise tokens are random.
    `checks_energy` polls the first GPU's power beside its counter.  `process_started` is the time,
    in seconds since the epoch, from which the cold start counts.
    """

    warmup: int
    steps: int
    profile: bool
    reads_data: bool
    process_started: float
    checks_energy: bool = False


class RandomBatches:
    """Random tokens that are made once and handed out at every step, on the device.

    The same for all ranks of a model replica and different from replica to replica.  Has what a
    step uses of a `BatchLoader`.
    """

    wait_seconds = 0.0

    def __init__(self, run: TrainingRun) -> None:
        config, device = run.config, run.process.device.device
        count = config.num_micro_batches(run.process.world_size)
        assert count is not None, "validated before the start"
        size_b, size_s = config.batch.micro, config.data.sequence_length
        generator = torch.Generator()  # on the CPU: the same tokens on every kind of device
        generator.manual_seed(config.seed + run.layout.coordinates(run.process.rank).data)
        shape = (count, size_b, size_s + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
        positions_bs = torch.arange(size_s, device=device).repeat(size_b, 1)
        mask_bs = torch.ones(size_b, size_s, device=device)
        self._step = [
            Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions_bs, mask_bs)
            for ids in tokens
        ]

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of a step."""
        return self._step

    def close(self) -> None:
        """Nothing to close."""


def run_benchmark(config: RunConfig, options: BenchmarkOptions) -> Record:
    """Set up, warm up, measure; the result as a JSON object, whole on the first rank.

    A figure that cannot be measured on this device is null.

    Raises:
        UserError: the configuration or the data is wrong.
        LitesparkError: a rate above the hardware's peak.
    """
    try:
        process = start_processes(config)
        samples = on_all_ranks(lambda: _check(config, process.world_size, options.reads_data))
        run = build_run(config, process)
        if samples is not None:
            prepare_reference(run, samples, None)
        if run.reads_tokens:
            batches = RandomBatches(run) if samples is None else batch_loader(run, samples)
            run.train_batches = batches  # type: ignore[assignment] - all that a step asks for
        try:
            return _measure(run, options)
        finally:
            run.close()
    finally:
        stop_process_group()


def _check(config: RunConfig, world_size: int, reads_data: bool) -> Blend | None:
    """The mistakes a user can make, and the data if any is read."""
    check_config(config, world_size)
    if reads_data:
        return open_data(config)[0]
    if config.task != "pretrain":
        raise UserError(
            f"task = {config.task}",
            "is not measured on random tokens, which are no answers",
            f"Name a shard of preprocess --task {config.task}: --data PREFIX.",
        )
    if config.data.document_mask:
        raise UserError(
            "data.document_mask = true",
            "has no effect on random tokens, which are no documents",
            "Name a shard (--data PREFIX), or set data.document_mask=false.",
        )
    return None


def _measure(run: TrainingRun, options: BenchmarkOptions) -> Record:
    device = run.process.device
    device.synchronize()
    set_up_at = time.time()
    outcome = train_step(run)
    device.synchronize()
    first_step_at = time.time()
    for _ in range(options.warmup - 1):
        outcome = train_step(run)

    def step() -> None:
        nonlocal outcome
        outcome = train_step(run)

    timing = time_steps(
        step,
        options.steps,
        device.synchronize,
        EnergyMeter(),
        polls_power=options.checks_energy and run.process.is_first,
    )
    peak_bytes_of_ranks = gather_objects(peak_memory_bytes(device.type))
    loss = mean_loss(outcome.loss_and_tokens)
    squared_tokens = math.fsum(gather_objects(run.timings.squared_document_tokens))
    work = Work(
        shape=run.config.model,
        sequence_length=run.config.data.sequence_length,
        tokens_per_step=run.config.tokens_per_step,
        precision=run.config.precision.mode,
        device_name=device.name,
        gpus=run.process.world_size,
        attended_tokens=attended_tokens(run, squared_tokens, run.step),
    )
    return {
        **_description(run, options),
        **figures(work, over_ranks(timing)),
        "energy_check": energy_check(timing),
        "peak_memory_gib": max(peak_bytes_of_ranks) / _GIBIBYTE,
        "peak_memory_gib_of_ranks": [peak / _GIBIBYTE for peak in peak_bytes_of_ranks],
        "loss": loss if math.isfinite(loss) else None,  # NaN is no JSON
        "set_up_seconds": set_up_at - options.process_started,
        "first_step_seconds": first_step_at - set_up_at,
        "start_to_first_step_seconds": first_step_at - options.process_started,
        **software(Path(litespark.__file__).parents[1]),
        "breakdown": _breakdown(run, step) if options.profile else None,
    }


def _breakdown(run: TrainingRun, step: Callable[[], None]) -> Record | None:
    """One further step; every rank takes part, and each GPU's kernels are its own."""
    if run.process.device.type != "cuda":
        return None
    if not run.process.is_first:
        step()
        return None
    kernels, wall_seconds = record_kernels(step)
    tokens = run.config.tokens_per_step / run.process.world_size
    return break_down(kernels, wall_seconds, tokens)


def _description(run: TrainingRun, options: BenchmarkOptions) -> Record:
    """What was measured, on what."""
    config, model = run.config, run.config.model
    return {
        "implementation": "litespark",
        "model": model.preset,
        "shape": {
            key: getattr(model, key)
            for key in (
                *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
                *("num_query_groups", "head_dim", "vocab_size"),
            )
        },
        "parameters": total_parameters(model, model.tie_embeddings, model.qkv_bias, model.qk_norm),
        "precision": config.precision.model_dump(mode="json"),
        "backend": model.backend,
        "modules": _modules(run),
        "parallel": run.layout.describe(),
        "sequence_length": config.data.sequence_length,
        "micro_batch": config.batch.micro,
        "accumulate": config.num_micro_batches(run.process.world_size),
        "tokens": "data" if options.reads_data else "random",
        "document_mask": config.data.document_mask,
        "task": config.task,
        "recompute": config.training.recompute,
        "cuda_graph": config.training.cuda_graph,
        "attention": model.attention,
        "warmup": options.warmup,
        "device": run.process.device.name,
        "gpus": run.process.world_size,
    }


def _modules(run: TrainingRun) -> dict[str, str]:
    """The class of each module of this rank's first layer: what really ran, whatever was asked."""
    named = run.chunks[0].named_modules()
    parts = ((name.partition(".layers.0.")[2], module) for name, module in named)
    classes = {name: type(module).__name__ for name, module in parts if name}
    return {name: kind for name, kind in classes.items() if not kind.startswith("Identity")}
