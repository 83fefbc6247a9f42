"""Which curves a report draws, and from which columns of the metrics.

Loss comes twice: over the whole run, where the first steps set the scale, and smoothed after its
first quarter, where the differences between runs are.  Smoothing is a centred mean, not an
exponential one: the latter lags behind a falling loss and would show a run as worse than it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from litespark.metering.run_log import ENERGY_KEYS, RunLog
from litespark.metering.svg import Chart, Series

WIDE = 1060  # pixels of a chart that takes the whole width

_SMOOTHING_SHARE = 200  # two passes of this half-width make a window of a fiftieth of the run
_MIN_SMOOTHED_STEPS = 20
_MAX_MARKERS = 60
_MAX_NAME_CHARACTERS = 28
_JOULES_PER_KILOWATT_HOUR = 3.6e6


class _Curve(NamedTuple):
    """A small chart: one column of the metrics, its axis, and how to scale it."""

    title: str
    key: str
    unit: str
    from_zero: bool = True
    clips_outliers: bool = False
    factor: float = 1.0


_CURVES = (
    _Curve("Learning rate", "lr", "learning rate"),
    _Curve("Gradient norm", "grad_norm", "global norm before clipping", from_zero=False),
    _Curve("Step time", "step_seconds", "seconds per step", clips_outliers=True),
    _Curve("Throughput", "tokens_per_second", "tokens per second"),
    _Curve("MFU", "mfu", "% of the dense BF16 peak, causal attention", factor=100.0),
    _Curve("Power", "power_watts", "watts, all GPUs"),
    _Curve("Energy of training", "joules_per_token", "joules per 1000 tokens", factor=1000.0),
    _Curve("Memory", "memory_bytes", "GiB, peak of the fullest rank", factor=2.0**-30),
)


def run_charts(run: RunLog, other: RunLog | None, names: tuple[str, str]) -> list[Chart]:
    """All charts of a report, of one run or of two; some may have nothing to show."""
    marks = run.marks()
    charts = [_loss_chart(run, other, names, marks)]
    if len(run.steps) >= 2 * _MIN_SMOOTHED_STEPS:
        charts.append(_late_loss_chart(run, other, names, marks))
    for curve in _CURVES:
        series = [_column(run, curve, short_name(names[0]), "main")]
        if other is not None:
            series.append(_column(other, curve, short_name(names[1]), "other"))
        charts.append(
            Chart(
                curve.title,
                "step",
                curve.unit,
                series,
                marks,
                from_zero=curve.from_zero,
                clips_outliers=curve.clips_outliers,
            )
        )
    charts.append(_energy_chart(run, other, names, marks))
    charts.append(_stall_chart(run, marks))
    return charts


def _energy_chart(
    run: RunLog, other: RunLog | None, names: tuple[str, str], marks: list[tuple[float, str]]
) -> Chart:
    """All joules of the GPUs since the first step, added up."""
    series = [Series(short_name(names[0]), run.steps, _kilowatt_hours(run))]
    if other is not None:
        series.append(Series(short_name(names[1]), other.steps, _kilowatt_hours(other), "other"))
    return Chart("Energy", "step", "kWh since the start, all GPUs", series, marks, from_zero=True)


def _kilowatt_hours(run: RunLog) -> list[float]:
    """Sums over the lines; a line without a figure adds nothing and is a gap."""
    columns = [run.column(key) for key in ENERGY_KEYS if key != "host_joules"]
    total, sums = 0.0, []
    for values in zip(*columns, strict=True):
        known = [value for value in values if math.isfinite(value)]
        total += math.fsum(known)
        sums.append(total / _JOULES_PER_KILOWATT_HOUR if known else math.nan)
    return sums


def _stall_chart(run: RunLog, marks: list[tuple[float, str]]) -> Chart:
    """Where each step's time goes, as far as the host sees it; lines cover several steps."""
    before = [0, *run.steps[:-1]]
    counts = [max(1, step - last) for step, last in zip(run.steps, before, strict=True)]
    waits = _per_step(run, "data_wait_seconds", counts)
    saves = _per_step(run, "checkpoint_seconds", counts)
    computing = [
        seconds - (wait if math.isfinite(wait) else 0.0)
        for seconds, wait in zip(run.column("step_seconds"), waits, strict=True)
    ]
    series = [
        Series("computing", run.steps, computing),
        Series("waiting for data", run.steps, waits, "second"),
        Series("held up by checkpoints", run.steps, saves, "other"),
    ]
    title = "Where a step's time goes"
    return Chart(
        *(title, "step", "seconds per step", series, marks), from_zero=True, clips_outliers=True
    )


def _per_step(run: RunLog, key: str, counts: Sequence[int]) -> list[float]:
    return [value / count for value, count in zip(run.column(key), counts, strict=True)]


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over about a fiftieth of the values, narrower towards both ends.

    Two passes of a plain mean weigh the middle most, so a single spike becomes a peak and not a
    plateau.  NaN values are left out of the means and stay NaN.
    """
    half_window = max(1, len(values) // _SMOOTHING_SHARE)
    return _centred_mean(_centred_mean(values, half_window), half_window)


def _centred_mean(values: Sequence[float], half_window: int) -> list[float]:
    sums, counts = [0.0], [0]
    for value in values:
        is_finite = math.isfinite(value)
        sums.append(sums[-1] + (value if is_finite else 0.0))
        counts.append(counts[-1] + is_finite)
    means = []
    for index, value in enumerate(values):
        reach = min(half_window, index, len(values) - 1 - index)
        low, high = index - reach, index + reach + 1
        mean = (sums[high] - sums[low]) / max(1, counts[high] - counts[low])
        means.append(mean if math.isfinite(value) else math.nan)
    return means


def short_name(name: str) -> str:
    """A name that fits into a legend."""
    return name if len(name) <= _MAX_NAME_CHARACTERS else name[: _MAX_NAME_CHARACTERS - 1] + "…"


def _column(run: RunLog, curve: _Curve, label: str, style: str) -> Series:
    values = [value * curve.factor for value in run.column(curve.key)]
    return Series(label, run.steps, values, style)


def _loss_chart(
    run: RunLog, other: RunLog | None, names: tuple[str, str], marks: list[tuple[float, str]]
) -> Chart:
    """Training loss thin with its smoothed line, validation as points."""
    if len(run.steps) < _MIN_SMOOTHED_STEPS:
        series = [Series("training", run.steps, run.column("loss"), has_markers=True)]
    else:
        series = [
            Series("training", run.steps, run.column("loss"), "raw"),
            Series("training, smoothed", run.steps, smoothed(run.column("loss"))),
        ]
    series += _validation(run, "validation", "second")
    if other is not None:
        series += _others_losses(other, short_name(names[1]), 0)
    return Chart("Loss", "step", "nats per token", series, marks, width=WIDE, height=380)


def _late_loss_chart(
    run: RunLog, other: RunLog | None, names: tuple[str, str], marks: list[tuple[float, str]]
) -> Chart:
    """The smoothed losses after the first quarter of the run."""
    first = run.steps[0] + (run.steps[-1] - run.steps[0]) // 4
    series = [Series("training, smoothed", run.steps, smoothed(run.column("loss")))]
    series += _validation(run, "validation", "second")
    series = [_from_step(line, first) for line in series]
    if other is not None:
        series += _others_losses(other, short_name(names[1]), first)
    marks = [(step, label) for step, label in marks if step >= first]
    title = "Loss after the first quarter, smoothed"
    return Chart(title, "step", "nats per token", series, marks, width=WIDE, height=320)


def _others_losses(other: RunLog, name: str, first: int) -> list[Series]:
    losses = other.column("loss")
    if len(losses) >= _MIN_SMOOTHED_STEPS:
        losses = smoothed(losses)
    series = [Series(f"{name}: training", other.steps, losses, "other")]
    series += _validation(other, f"{name}: validation", "other2")
    return [_from_step(line, first) for line in series]


def _validation(run: RunLog, label: str, style: str) -> list[Series]:
    points = sorted(run.validation.items())
    if not points:
        return []
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    return [Series(label, steps, losses, style, has_markers=len(points) <= _MAX_MARKERS)]


def _from_step(series: Series, first: int) -> Series:
    kept = [(x, y) for x, y in zip(series.x, series.y, strict=True) if x >= first]
    xs, ys = [x for x, _ in kept], [y for _, y in kept]
    return Series(series.label, xs, ys, series.style, series.has_markers)
