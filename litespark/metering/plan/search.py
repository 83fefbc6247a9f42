"""All layouts of a run on so many GPUs, judged: which fit, which is fastest, why the others lose.

Every combination of degrees, micro-batch and recomputation that the configuration's rules allow is
computed; there are some thousands at 1024 GPUs, at a fraction of a millisecond each.  Of layouts
that differ in recomputation alone those that recompute are looked at only where none fits without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from litespark.config.schema import RunConfig
from litespark.config.validate import validate
from litespark.metering.flops import flops_per_token, mfu, tflops
from litespark.metering.gpu_peaks import peak_for_device
from litespark.metering.plan.calibration import Calibration
from litespark.metering.plan.communication import Network
from litespark.metering.plan.energy import JOULES_PER_KILOWATT_HOUR, step_joules
from litespark.metering.plan.memory import MemoryPlan, memory_plan
from litespark.metering.plan.time import StepTime, step_time

_GIBIBYTE = 2**30
_SECONDS_PER_DAY = 86400.0
_LARGEST_MICRO_BATCH = 64
_RECOMPUTE = ("none", "selective", "full")
_PART_NAMES = {
    "recompute": "recomputed work",
    "tensor": "tensor-parallel messages",
    "context": "context-parallel messages",
    "transfer": "messages between stages",
    "bubble": "the pipeline's bubble",
    "data": "data-parallel messages",
    "gaps": "gaps between kernels",
    "host": "the host's launches",
    "products": "smaller matrix products",
    "attention": "attention",
    "between": "memory traffic between the products",
    "optimizer": "the optimizer",
}


@dataclass(frozen=True)
class Cluster:
    """What a plan is for."""

    gpus: int
    calibration: Calibration
    network: Network

    @property
    def capacity_bytes(self) -> float:
        """Memory of one GPU."""
        return self.calibration.memory_gib * _GIBIBYTE


@dataclass(frozen=True)
class Plan:
    """One layout, whose configuration must be valid for so many processes.

    `verdict` says why it is not the best, or is empty.
    """

    config: RunConfig
    cluster: Cluster
    verdict: str = ""

    @cached_property
    def memory(self) -> MemoryPlan:
        """Of the rank that needs the most."""
        return memory_plan(self.config, self.cluster.gpus)

    @cached_property
    def step(self) -> StepTime:
        """Of one optimizer step."""
        cluster = self.cluster
        return step_time(self.config, cluster.gpus, cluster.calibration, cluster.network)

    @property
    def fits(self) -> bool:
        """Whether every rank's memory suffices."""
        return self.memory.needed <= self.cluster.capacity_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.config.tokens_per_step / self.step.total

    @property
    def joules_per_token(self) -> float:
        """GPUs only."""
        joules = step_joules(self.config, self.step, self.cluster.calibration)
        return joules * self.cluster.gpus / self.config.tokens_per_step

    @property
    def tflops_per_gpu(self) -> float:
        """Useful work with causal attention."""
        work = flops_per_token(self.config.model, self.config.data.sequence_length, causal=True)
        return tflops(self.tokens_per_second / self.cluster.gpus, work)

    @property
    def mfu(self) -> float | None:
        """Causal, over the dense BF16 peak."""
        peak = peak_for_device(self.cluster.calibration.device)
        return mfu(self.tflops_per_gpu, None if peak is None else peak.bf16_tflops)

    def days(self, tokens: float) -> float:
        """Of training on so many tokens."""
        return tokens / self.tokens_per_second / _SECONDS_PER_DAY

    def megawatt_hours(self, tokens: float) -> float:
        """Of the GPUs, for so many tokens."""
        return tokens * self.joules_per_token / JOULES_PER_KILOWATT_HOUR / 1000

    def overrides(self) -> list[str]:
        """The keys that make a configuration this layout, as typed on the command line."""
        parallel = self.config.parallel
        pairs: dict[str, Any] = {
            f"parallel.{key}": getattr(parallel, key)
            for key in ("tensor", "pipeline", "virtual_pipeline", "context", "sequence")
        }
        pairs |= {
            "parallel.overlap_grad_reduce": parallel.overlap_grad_reduce,
            "parallel.overlap_param_gather": parallel.overlap_param_gather,
            "batch.micro": self.config.batch.micro,
            "training.recompute": self.config.training.recompute,
        }
        return [f"{key}={str(value).lower()}" for key, value in pairs.items()]

    def as_record(self, tokens: float | None) -> dict[str, Any]:
        """For JSON; SI units, days and MWh for the budget of tokens if there is one."""
        return {
            "overrides": self.overrides(),
            "data_parallel": self.config.data_parallel_size(self.cluster.gpus),
            "fits": self.fits,
            "verdict": self.verdict,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.cluster.gpus,
            "tflops_per_gpu_causal": self.tflops_per_gpu,
            "mfu": self.mfu,
            "joules_per_token": self.joules_per_token,
            "days": None if tokens is None else self.days(tokens),
            "megawatt_hours": None if tokens is None else self.megawatt_hours(tokens),
            "memory_bytes": self.memory.as_record(),
            "step_seconds": self.step.as_record(),
        }


def search(config: RunConfig, cluster: Cluster) -> list[Plan]:
    """Every layout that the rules allow: those that fit, fastest first, then those that do not.

    Each but the first says in its verdict why it loses.
    """
    plans: list[Plan] = []
    for candidate in _layouts(config, cluster.gpus):
        for recompute in _RECOMPUTE:
            if recompute == "full" and config.training.cuda_graph:
                break  # not valid together
            training = candidate.training.model_copy(update={"recompute": recompute})
            plan = Plan(candidate.model_copy(update={"training": training}), cluster)
            plans.append(plan)
            if plan.fits:
                break
    fitting = sorted((p for p in plans if p.fits), key=lambda p: p.step.total)
    others = sorted((p for p in plans if not p.fits), key=lambda p: p.memory.needed)
    return [*_with_verdicts(fitting), *(replace(p, verdict=_too_large(p)) for p in others)]


def _with_verdicts(fitting: list[Plan]) -> Iterator[Plan]:
    for number, plan in enumerate(fitting):
        yield plan if number == 0 else replace(plan, verdict=_why_slower(plan, fitting[0]))


def _too_large(plan: Plan) -> str:
    over = (plan.memory.needed - plan.cluster.capacity_bytes) / _GIBIBYTE
    parts = {
        "weights, gradients and optimizer": plan.memory.weights
        + plan.memory.gradients
        + plan.memory.optimizer
        + plan.memory.fp8_copies,
        "activations": plan.memory.activations,
        "temporaries": plan.memory.temporary,
    }
    largest = max(parts, key=lambda name: parts[name])
    return f"memory over by {over:,.{1 if over >= 1 else 2}f} GiB, mostly {largest}"


def _why_slower(plan: Plan, best: Plan) -> str:
    """The two parts of the step that cost most beside the best layout's."""
    slower = plan.step.total / best.step.total - 1
    if slower < 5e-4:
        return "as fast"
    mine, theirs = plan.step.as_record(), best.step.as_record()
    more = {part: mine[part] - theirs[part] for part in _PART_NAMES}
    dearest = sorted(more, key=lambda part: -more[part])[:2]
    reasons = [
        f"{_PART_NAMES[part]} +{100 * more[part] / best.step.total:.1f} %"
        for part in dearest
        if more[part] > 0.002 * best.step.total
    ]
    return f"{100 * slower:.1f} % slower: {', '.join(reasons) or 'a little of everything'}"


def _layouts(config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    """All valid configurations, without a choice of recomputation."""
    model = config.model
    for tensor in _divisors(gpus, 8):
        for pipeline in _divisors(gpus // tensor, model.num_layers):
            for context in _divisors(gpus // tensor // pipeline, 16):
                yield from _batches(config, gpus, (tensor, pipeline, context))


def _batches(config: RunConfig, gpus: int, degrees: tuple[int, int, int]) -> Iterator[RunConfig]:
    """The layouts of three degrees: chunks of a stage and micro-batches."""
    tensor, pipeline, context = degrees
    if config.model.num_layers % pipeline:
        return
    data = gpus // (tensor * pipeline * context)
    per_replica, rest = divmod(config.batch.global_, data)
    if rest or not per_replica:
        return
    several = data * context > 1
    chunks = _divisors(config.model.num_layers // pipeline) if pipeline > 1 else (1,)
    for virtual in chunks:
        update = {
            "tensor": tensor,
            "pipeline": pipeline,
            "context": context,
            "virtual_pipeline": virtual,
            "sequence": tensor > 1,
            "distributed_optimizer": True,
            "overlap_grad_reduce": several,
            "overlap_param_gather": several,
        }
        parallel = config.parallel.model_copy(update=update)
        for micro in _divisors(per_replica, _LARGEST_MICRO_BATCH):
            batch = config.batch.model_copy(update={"micro": micro})
            candidate = config.model_copy(update={"parallel": parallel, "batch": batch})
            if not validate(candidate, gpus):
                yield candidate


def _divisors(number: int, largest: int | None = None) -> tuple[int, ...]:
    limit = number if largest is None else min(number, largest)
    return tuple(d for d in range(1, limit + 1) if number % d == 0)


def best_of_each_kind(plans: Iterable[Plan], count: int) -> list[Plan]:
    """The first `count` plans, one for each combination of degrees: no two differ in chunks or
    micro-batch alone."""
    found: dict[tuple[int, int, int, str], Plan] = {}
    for plan in plans:
        parallel = plan.config.parallel
        key = (
            parallel.tensor,
            parallel.pipeline,
            parallel.context,
            plan.config.training.recompute,
        )
        found.setdefault(key, plan)
    return list(found.values())[:count]
