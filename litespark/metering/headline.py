"""The figures of a run in one table, each with how it was measured.

Rates are medians over the logged steps: the first steps of a process compile and warm up, and a
mean would mix that in.  A figure without a measurement has no value, and the report says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from litespark.metering.run_log import RunLog

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_JOULES_PER_KILOWATT_HOUR = 3.6e6


@dataclass(frozen=True)
class Figure:
    """One row: `value` in the unit that `show` writes, or None when it was not measured."""

    label: str
    value: float | None
    show: Callable[[float], str]
    note: str = ""

    @property
    def text(self) -> str:
        """The value as a person reads it."""
        return "not measured" if self.value is None else self.show(self.value)


def headline(run: RunLog) -> list[Figure]:
    """The figures of a run, in the order of the report."""
    logged = len(run.steps)
    lines = "1 logged step" if logged == 1 else f"{logged:,} logged steps"
    start = _segment_start(run)
    median = f"median since the resume at step {start:,}" if start else "median"
    per_gpu = f"{median}, per GPU"
    return [
        Figure("Steps", run.steps[-1], _count, lines),
        Figure("Tokens", _last(run, "tokens"), large_count),
        *_losses(run),
        Figure("Step time", _median(run, "step_seconds"), _seconds, median),
        Figure(
            "Tokens per second",
            _median(run, "tokens_per_second"),
            _rate,
            f"{median}, all devices",
        ),
        Figure(
            "Tokens per second per GPU", _median(run, "tokens_per_second_per_gpu"), _rate, median
        ),
        Figure(
            "TFLOP/s, causal attention",
            _median(run, "tflops_per_gpu_causal"),
            _rate,
            f"{per_gpu}: the work needed; recomputed work never counts",
        ),
        Figure(
            "TFLOP/s, full attention",
            _median(run, "tflops_per_gpu_full"),
            _rate,
            f"{per_gpu}: the convention of many reports",
        ),
        Figure(
            "MFU",
            _median(run, "mfu"),
            _percent,
            f"{median}: causal TFLOP/s over the GPU's dense BF16 peak, whatever the precision",
        ),
        *_energy(run, median),
        Figure("Peak memory", _largest(run, "memory_bytes"), byte_size, "largest of all ranks"),
        Figure(
            "Waiting for data", _data_wait_share(run), _percent, "share of the time of the steps"
        ),
        Figure("Writing checkpoints", _sum(run, "checkpoint_seconds"), _seconds, "in total"),
    ]


def byte_size(num_bytes: float) -> str:
    """A number of bytes in binary units: 23.4 GiB."""
    power = 0 if num_bytes < 1 else min(int(math.log2(num_bytes) // 10), len(_BINARY_UNITS) - 1)
    return f"{num_bytes / 1024**power:.4g} {_BINARY_UNITS[power]}"


def large_count(value: float) -> str:
    """A count in words where digits would be too many: 812,345 or 2.29 billion."""
    for unit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= unit:
            return f"{value / unit:.3g} {word}"
    return f"{value:,.0f}"


def _losses(run: RunLog) -> list[Figure]:
    at = [(s, v) for s, v in zip(run.steps, run.column("loss"), strict=True) if math.isfinite(v)]
    best = min(at, key=lambda pair: pair[1], default=None)
    rows = [
        _at_step("Training loss, first", at[0] if at else None),
        _at_step("Training loss, last", at[-1] if at else None),
        _at_step("Training loss, best", best),
    ]
    checks = [(s, v) for s, v in sorted(run.validation.items()) if math.isfinite(v)]
    rows.append(_at_step("Validation loss, last", checks[-1] if checks else None))
    if len(checks) > 1:
        rows.append(_at_step("Validation loss, best", min(checks, key=lambda pair: pair[1])))
    return rows


def _at_step(label: str, pair: tuple[int, float] | None) -> Figure:
    if pair is None:
        return Figure(label, None, _loss)
    return Figure(label, pair[1], _loss, f"nats per token, at step {pair[0]:,}")


def _energy(run: RunLog, median: str) -> list[Figure]:
    """Sums over the logged steps; each line holds the energy since the one before."""
    used = run.finite("energy_joules")
    note = "GPUs only, while training"
    if 0 < len(used) < len(run.steps):
        note += f"; measured at {len(used):,} of {len(run.steps):,} logged steps"
    return [
        Figure("Energy", sum(used) if used else None, _joules, note),
        Figure("Energy per 1k tokens", _per_thousand_tokens(run), _joules, median),
        Figure("Power", _median(run, "power_watts"), _watts, f"{median}, all GPUs"),
    ]


def _per_thousand_tokens(run: RunLog) -> float | None:
    joules = _median(run, "joules_per_token")
    return None if joules is None else 1000 * joules


def _data_wait_share(run: RunLog) -> float | None:
    """Seconds waited over seconds of steps; a line covers the steps since the one before."""
    waited = total = 0.0
    before = 0
    seconds, waits = run.column("step_seconds"), run.column("data_wait_seconds")
    for step, step_seconds, wait in zip(run.steps, seconds, waits, strict=True):
        if math.isfinite(step_seconds) and math.isfinite(wait):
            waited += wait
            total += step_seconds * (step - before)
        before = step
    return waited / total if total > 0 else None


def _last(run: RunLog, key: str) -> float | None:
    values = run.finite(key)
    return values[-1] if values else None


def _median(run: RunLog, key: str) -> float | None:
    """The median since the last resume: over two layouts it would be a rate that neither had."""
    start = _segment_start(run)
    column = zip(run.steps, run.column(key), strict=True)
    values = [value for step, value in column if step > start and math.isfinite(value)]
    return statistics.median(values) if values else None


def _segment_start(run: RunLog) -> int:
    """The last step at which the run resumed and after which it logged; 0 if there is none."""
    return max((step for step in run.resume_steps() if step < run.steps[-1]), default=0)


def _largest(run: RunLog, key: str) -> float | None:
    return max(run.finite(key), default=None)


def _sum(run: RunLog, key: str) -> float | None:
    values = run.finite(key)
    return sum(values) if values else None


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
    return f"{value * 1000:.3g} ms" if 0 < value < 0.1 else f"{value:.3g} s"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _joules(value: float) -> str:
    if value < _JOULES_PER_KILOWATT_HOUR:
        return f"{value / 1000:.3g} kJ" if value >= 1e3 else f"{value:.3g} J"
    return f"{value / 1e6:,.4g} MJ ({value / _JOULES_PER_KILOWATT_HOUR:,.3g} kWh)"


def _watts(value: float) -> str:
    return f"{value / 1000:,.4g} kW" if value >= 1e4 else f"{value:,.0f} W"
