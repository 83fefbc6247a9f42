"""The charts of a report as PNG files, for slides and mails; drawn by matplotlib.

The pages need no library; these pictures do, because a bitmap is a matter of fonts and rasters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from litespark.errors import MissingExtraError, UserError
from litespark.metering.charts import WIDE, run_charts
from litespark.metering.run_log import RunLog
from litespark.metering.svg import LOG_RATIO, Chart, Series

_DPI = 144
_INCHES_PER_PIXEL = 1 / 96
# colour, width, dashes, opacity of the styles of `svg.CHART_STYLE` on white
_STYLES: dict[str, tuple[str, float, str, float]] = {
    "raw": ("#1f6feb", 0.8, "-", 0.45),
    "main": ("#1f6feb", 1.4, "-", 1.0),
    "second": ("#d9730d", 1.4, "-", 1.0),
    "other": ("#8a3ffc", 1.4, "--", 1.0),
    "other2": ("#8a3ffc", 1.2, ":", 1.0),
}


def write_pngs(
    run: RunLog, other: RunLog | None, names: tuple[str, str], folder: Path
) -> list[Path]:
    """One PNG a chart that has something to show, into `folder`, which is made; their paths.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UserError: the folder cannot be written to.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "--png") from None
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in run_charts(run, other, names):
            if any(value == value for series in chart.series for value in series.y):
                path = folder / f"{_file_name(chart.title)}.png"
                _draw(Figure, chart).savefig(path, dpi=_DPI, metadata={"Software": None})
                written.append(path)
    except OSError as error:
        raise UserError(
            f"--png {folder}",
            f"cannot be written ({error.strerror})",
            "Give a folder that can be written to.",
        ) from error
    return written


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def _draw(make_figure: Any, chart: Chart) -> Any:
    size = (chart.width * _INCHES_PER_PIXEL, chart.height * _INCHES_PER_PIXEL)
    figure = make_figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for series in chart.series:
        _line(axes, series)
    finite = [value for series in chart.series for value in series.y if value == value]
    if chart.from_zero:
        axes.set_ylim(bottom=min(0.0, *finite))
    elif min(finite) > 0 and max(finite) > LOG_RATIO * min(finite):
        axes.set_yscale("log")
    for place, label in chart.marks:
        axes.axvline(place, color="#5c6776", linewidth=0.8, linestyle=":")
        axes.annotate(
            label,
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            rotation=90,
            va="top",
            ha="right",
            color="#5c6776",
        )
    axes.set_title(chart.title, loc="left", fontsize=11 if chart.width == WIDE else 10)
    axes.set_xlabel(chart.x_label, fontsize=8)
    axes.set_ylabel(chart.y_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e7eaee", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _line(axes: Any, series: Series) -> None:
    colour, width, dashes, opacity = _STYLES[series.style]
    axes.plot(
        series.x,
        series.y,
        color=colour,
        linewidth=width,
        linestyle=dashes,
        alpha=opacity,
        marker="o" if series.has_markers or len(series.x) == 1 else None,
        markersize=3,
        label=series.label,
    )
