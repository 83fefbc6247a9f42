"""Timing a training step, and the figures that follow from it: one way for us and for the peers.

Each step is timed on its own, with the device idle before and after it, so that median and spread
are known and a single slow step (another process, a clock that drops) cannot hide in a mean.
Energy is the difference of the driver's counter around all timed steps.  Nothing here needs
megatron-core: a peer runs in its own process, perhaps with another version of it.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litespark.metering.energy import EnergyMeter
from litespark.metering.flops import TransformerShape, flops_per_token, mfu, tflops
from litespark.metering.gpu_peaks import Precision, check_below_peak, peak_for_device
from litespark.metering.power import PowerIntegral, PowerPoller
from litespark.parallel.device import cudnn_version
from litespark.parallel.groups import gather_objects

Record = dict[str, Any]

# What decides the speed, by the name under which it is installed.
_PACKAGES = (
    *("triton", "transformer-engine", "flash-attn-4", "flash-attn", "megatron-core"),
    *("nvidia-cudnn-frontend", "nvidia-cublas", "nvidia-cublas-cu12", "transformers", "torchao"),
)


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed step, of all together, and joules over them (None: not measured).

    `integral` is the polled power over the same time, where that was asked for.
    """

    step_seconds: list[float]
    region_seconds: float
    joules: float | None
    integral: PowerIntegral | None = None


@dataclass(frozen=True)
class Work:
    """What one step does: over `gpus` devices, `tokens_per_step` tokens in all.

    `attended_tokens` is the mean length of what a token attends within, with document masks its
    document's; None: the sequence's.
    """

    shape: TransformerShape
    sequence_length: int
    tokens_per_step: int
    precision: Precision
    device_name: str
    gpus: int = 1
    attended_tokens: float | None = None


def time_steps(
    step: Callable[[], object],
    count: int,
    synchronize: Callable[[], None],
    energy: EnergyMeter,
    *,
    polls_power: bool = False,
) -> Timing:
    """Run `step` `count` times, waiting for the device after each."""
    synchronize()
    step_seconds = []
    poller = PowerPoller(energy.read_watts) if polls_power else None
    if poller is not None:
        poller.start()
    joules_before = energy.read_joules()
    region_started = time.perf_counter()
    for _ in range(count):
        started = time.perf_counter()
        step()
        synchronize()
        step_seconds.append(time.perf_counter() - started)
    region_seconds = time.perf_counter() - region_started
    joules_after = energy.read_joules()
    integral = None if poller is None else poller.stop()
    if joules_before is None or joules_after is None:
        return Timing(step_seconds, region_seconds, None, integral)
    return Timing(step_seconds, region_seconds, joules_after - joules_before, integral)


def over_ranks(timing: Timing) -> Timing:
    """One timing of all ranks: the slowest rank's step, and the joules of all; a collective call.

    Joules are None if any rank's were not measured.
    """
    timings: list[Timing] = gather_objects(timing)
    all_seconds = [each.step_seconds for each in timings]
    joules = [each.joules for each in timings]
    return Timing(
        step_seconds=[max(seconds) for seconds in zip(*all_seconds, strict=True)],
        region_seconds=max(each.region_seconds for each in timings),
        joules=None if None in joules else math.fsum(j for j in joules if j is not None),
    )


def figures(work: Work, timing: Timing) -> Record:
    """Rates, MFU, energy and power as a JSON object; rates are those of the median step.

    On a device whose peak is not known MFU is null, on a CPU all figures of a GPU are.

    Raises:
        LitesparkError: a rate above the peak of the precision, which is an error of measurement.
    """
    median = statistics.median(timing.step_seconds)
    fastest, slowest = min(timing.step_seconds), max(timing.step_seconds)
    tokens_per_second = work.tokens_per_step / median
    tokens = work.tokens_per_step * len(timing.step_seconds)
    joules = timing.joules
    return {
        "n": len(timing.step_seconds),
        "tokens_per_step": work.tokens_per_step,
        "step_seconds": {"median": median, "min": fastest, "max": slowest},
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_min": work.tokens_per_step / slowest,
        "tokens_per_second_max": work.tokens_per_step / fastest,
        **_per_gpu(work, tokens_per_second / work.gpus),
        "joules_per_1000_tokens": None if joules is None else 1000 * joules / tokens,
        "watts_per_gpu": None if joules is None else joules / timing.region_seconds / work.gpus,
    }


def energy_check(timing: Timing) -> Record | None:
    """The counter of one GPU beside the integral of its power; None where either is missing."""
    integral = timing.integral
    if integral is None or timing.joules is None:
        return None
    return {
        "seconds": integral.seconds,
        "samples": integral.samples,
        "counter_joules": timing.joules,
        "integrated_joules": integral.joules,
        "uncertainty_joules": integral.uncertainty_joules,
        "percent_off": 100 * (integral.joules / timing.joules - 1) if timing.joules else None,
    }


def _per_gpu(work: Work, tokens_per_second: float) -> Record:
    peak = peak_for_device(work.device_name)
    attended = work.attended_tokens or work.sequence_length
    causal, full = (
        tflops(tokens_per_second, flops_per_token(work.shape, length, is_causal))
        for length, is_causal in ((attended, True), (work.sequence_length, False))
    )
    if peak is not None:
        check_below_peak(causal, peak, work.precision)
    on_gpu = work.device_name != "CPU"
    return {
        "tokens_per_second_per_gpu": tokens_per_second if on_gpu else None,
        "tflops_per_gpu_causal": causal if on_gpu else None,
        "tflops_per_gpu_full": full if on_gpu else None,
        "mfu": mfu(causal, None if peak is None else peak.bf16_tflops),
        "mfu_peak_tflops": None if peak is None else peak.bf16_tflops,
    }


def software(root: Path) -> Record:
    """Versions of what decides the speed, and the commit of the checkout at `root` if known."""
    versions: Record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": _commit(root)}


def _commit(root: Path) -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    command = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (root / ".git").exists():
        return None  # git would look in the folders above, and find another project
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
