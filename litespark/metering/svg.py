"""Line charts as SVG text: no library, no script, nothing to fetch.

A chart is a pure function of its data.  Colours are CSS classes, so one picture serves light, dark
and paper; `CHART_STYLE` holds their rules.  Three things make a plot readable that naive code gets
wrong: ticks at round numbers, spikes that survive thinning (each bucket of points keeps its
smallest and its largest), and a scale that neither an outlier nor a range of decades can flatten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

MAX_POINTS = 2000  # a line has fewer pixels than this
LOG_RATIO = 30.0  # largest / smallest from which a logarithmic axis shows more
OUTLIER_RATIO = 2.0  # a maximum this far above the 99th percentile would flatten the rest

_CHARACTER_WIDTH = 6.4  # of the 11-pixel labels, on average
_ROW_HEIGHT = 18
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

CHART_STYLE = """
svg.chart { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.chart text { fill: var(--muted); }
.chart .key { fill: var(--text); }
.chart .grid { stroke: var(--grid); stroke-width: 1; }
.chart .axis { stroke: var(--axis); stroke-width: 1; }
.chart .mark { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 2 3; }
.chart .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.chart circle { stroke: none; }
.chart .raw { stroke: var(--main); stroke-width: 1; opacity: 0.45; }
.chart .main { stroke: var(--main); } .chart circle.main, .chart circle.raw { fill: var(--main); }
.chart .second { stroke: var(--second); } .chart circle.second { fill: var(--second); }
.chart .other { stroke: var(--other); stroke-dasharray: 5 3; }
.chart circle.other { fill: var(--other); }
.chart .other2 { stroke: var(--other); stroke-dasharray: 1 3; }
.chart circle.other2 { fill: var(--other); }
"""


@dataclass(frozen=True)
class Series:
    """One line; NaN in `y` is a gap.  `style` is a CSS class: raw, main, second, other, other2."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "main"
    has_markers: bool = False


@dataclass(frozen=True)
class Chart:
    """What to draw; sizes in pixels.

    `from_zero` starts the y axis at 0, `clips_outliers` ends it near the 99th percentile and says
    how many points are above; otherwise a wide positive range gets a logarithmic axis.  `marks` are
    vertical lines with a label.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[tuple[float, str]] = ()
    width: int = 520
    height: int = 260
    from_zero: bool = False
    clips_outliers: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values laid on a range of pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """The pixel of a value; values outside are put on the edge."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_ticks(low: float, high: float, target: int, smallest_step: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `target` of them."""
    rough = max((high - low) / max(target, 1), smallest_step)
    power = 10.0 ** math.floor(math.log10(rough))
    # A few more lines than asked for read better than half as many.
    least = max(0.75 * rough, smallest_step * (1 - 1e-9))
    step = next(f * power for f in (1.0, 2.0, 5.0, 10.0) if f * power >= least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float, target: int) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them when there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, math.ceil(len(decades) / max(target, 1)))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**d for d in decades if d % every == 0 for f in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= target + 2:
            break
    return ticks


def short_number(value: float) -> str:
    """A number in at most a handful of characters: 1.25M, 320, 0.015, 3e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    for unit, suffix in _SUFFIXES:
        if size >= max(unit, 1e4):
            return f"{value / unit:.4g}{suffix}"
    if size >= 1e-2:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of one axis, all with the same suffix and number of decimals."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    smallest = min((abs(tick) for tick in ticks if tick), default=0.0)
    if len(ticks) < 2 or largest < 1e-2 or smallest < 1e-3 or largest / smallest > 1e3:
        return [short_number(tick) for tick in ticks]
    unit, suffix = next(((u, s) for u, s in _SUFFIXES if largest >= max(u, 1e4)), (1.0, ""))
    gap = min(b - a for a, b in pairwise(ticks)) / unit
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    labels = [f"{tick / unit:.{decimals}f}{suffix}" for tick in ticks]
    return ["0" if tick == 0 else label for tick, label in zip(ticks, labels, strict=True)]


def thin(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points of a line; each bucket keeps its smallest and largest value."""
    points = list(zip(x, y, strict=True))
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [point for point in bucket if math.isfinite(point[1])]
        if finite:
            ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
            kept += sorted(ends)
        else:
            kept.append((bucket[0][0], math.nan))
    return kept


def line_chart(chart: Chart) -> str:
    """The chart as an `<svg>` element; empty when no series has a finite value."""
    values = [v for series in chart.series for v in series.y if math.isfinite(v)]
    if not values:
        return ""
    keys = [s for s in chart.series if s.label]
    has_key_row = len(keys) > 1
    has_mark_row = any(label for _, label in chart.marks)
    top = (1 + has_key_row + has_mark_row) * _ROW_HEIGHT + 8
    bottom = chart.height - 2 * _ROW_HEIGHT
    y_axis, note = _y_axis(chart, values, bottom, top)
    labels = tick_labels(y_axis.ticks)
    left = 14 + _CHARACTER_WIDTH * max(map(len, labels), default=1)
    x_axis = _x_axis(chart, left, chart.width - 16)
    parts = [
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'aria-label="{escape(chart.title)}">',
        f'<text x="{left:.0f}" y="12">{escape(chart.y_label)}</text>',
        *(_keys(keys, left) if has_key_row else ()),
    ]
    for tick, label in zip(y_axis.ticks, labels, strict=True):
        at = y_axis.place(tick)
        parts.append(
            f'<path class="grid" d="M{x_axis.start:.1f} {at:.1f}H{x_axis.end:.1f}"/>'
            f'<text x="{left - 6:.0f}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'
        )
    parts.append(f'<path class="axis" d="M{x_axis.start:.1f} {bottom}H{x_axis.end:.1f}"/>')
    for tick, label in zip(x_axis.ticks, tick_labels(x_axis.ticks), strict=True):
        at = x_axis.place(tick)
        parts.append(
            f'<path class="axis" d="M{at:.1f} {bottom}v4"/>'
            f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
        )
    foot = chart.height - 4
    middle = (x_axis.start + x_axis.end) / 2
    if note:
        parts.append(f'<text x="{x_axis.end:.0f}" y="{foot}" text-anchor="end">{note}</text>')
        middle = x_axis.start + (x_axis.end - x_axis.start) / 5
    parts.append(
        f'<text x="{middle:.0f}" y="{foot}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    parts += _marks(chart.marks, x_axis, top, bottom)
    parts += [_line(series, x_axis, y_axis) for series in chart.series]
    return "".join(parts) + "</svg>"


def _y_axis(chart: Chart, values: list[float], start: float, end: float) -> tuple[Axis, str]:
    """The vertical axis, and a note about points above it."""
    low, high, note = min(values), max(values), ""
    ordered = sorted(values)
    usual = ordered[int(0.99 * (len(ordered) - 1))]
    if chart.clips_outliers and usual > 0 and high > OUTLIER_RATIO * usual:
        largest, high = high, 1.25 * usual
        above = sum(value > high for value in values)
        points = "1 point" if above == 1 else f"{above} points"
        note = f"{points} above, up to {short_number(largest)}"
    is_log = not chart.from_zero and low > 0 and high > LOG_RATIO * low
    target = max(3, int(abs(start - end) // 34))
    if is_log:
        low, high = low / 1.1, high * 1.1
        return Axis(low, high, start, end, True, tuple(log_ticks(low, high, target))), note
    if chart.from_zero:
        low = min(low, 0.0)
        high = high if high > low else low + 1.0
        high += 0.04 * (high - low)
    else:
        pad = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - pad, high + pad
    return Axis(low, high, start, end, False, tuple(linear_ticks(low, high, target))), note


def _x_axis(chart: Chart, start: float, end: float) -> Axis:
    """The horizontal axis over all series; steps are whole numbers, so its ticks are too."""
    low = min(min(series.x) for series in chart.series if len(series.x))
    high = max(max(series.x) for series in chart.series if len(series.x))
    if low < 0.05 * high:
        low = 0.0  # a run that begins near 0 shows it
    if low == high:
        return Axis(low - 1, high + 1, start, end, False, (low,))
    target = max(2, int((end - start) // 80))
    return Axis(low, high, start, end, False, tuple(linear_ticks(low, high, target, 1.0)))


def _keys(keys: Sequence[Series], left: float) -> list[str]:
    """The legend, one row below the axis label."""
    parts, x = [], left
    for series in keys:
        text = f'<text class="key" x="{x + 23:.0f}" y="{_ROW_HEIGHT + 12}">{escape(series.label)}'
        parts.append(
            f'<path class="line {series.style}" d="M{x:.0f} {_ROW_HEIGHT + 8}h18"/>{text}</text>'
        )
        x += 40 + _CHARACTER_WIDTH * len(series.label)
    return parts


def _marks(marks: Sequence[tuple[float, str]], axis: Axis, top: float, bottom: float) -> list[str]:
    """Vertical lines with labels above; one is left out where it would cover the one before."""
    parts, free_from = [], -math.inf
    for value, label in sorted(marks):
        if not axis.low <= value <= axis.high:
            continue
        at = axis.place(value)
        parts.append(f'<path class="mark" d="M{at:.1f} {top}V{bottom}"/>')
        half = _CHARACTER_WIDTH * len(label) / 2
        middle = min(max(at, axis.start + half), axis.end - half)
        if label and middle - half >= free_from:
            parts.append(
                f'<text x="{middle:.1f}" y="{top - 5}" text-anchor="middle">{escape(label)}</text>'
            )
            free_from = middle + half + 8
    return parts


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    """One series: a path with gaps at NaN; points alone and markers are dots."""
    runs: list[list[str]] = [[]]
    dots: list[str] = []
    for x, y in thin(series.x, series.y):
        if math.isfinite(y):
            runs[-1].append(f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}")
        elif runs[-1]:
            runs.append([])
    for run in runs:
        dots += run if series.has_markers or len(run) == 1 else []
    path = "".join("M" + "L".join(run) for run in runs if len(run) > 1)
    parts = [f'<path class="line {series.style}" d="{path}"/>'] if path else []
    for dot in dots:
        x, y = dot.split()
        parts.append(f'<circle class="{series.style}" cx="{x}" cy="{y}" r="2.5"/>')
    return "".join(parts)
