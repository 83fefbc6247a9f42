"""One HTML page about a run: figures, curves, layout, configuration.

The page is a single file without scripts and without anything to fetch, so it can be mailed, kept
beside the checkpoints and opened years later.  Everything that comes from the run's files is
escaped before it is placed in the page.  The same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from litespark.errors import UserError
from litespark.metering.charts import WIDE, run_charts, short_name
from litespark.metering.flops import flops_per_token, total_parameters
from litespark.metering.headline import Figure, headline, large_count
from litespark.metering.run_log import CONFIG_FILE, RunLog, read_run
from litespark.metering.svg import CHART_STYLE, line_chart
from litespark.utils.files import write_text_atomically

REPORT_FILE = "report.html"

_MAX_EVENTS = 100
_MAX_DIFFERENCES = 60

_LARGEST_SIZE = 10**9  # of a model's dimension; larger ones are a broken file, not a model


class _Shape(NamedTuple):
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int


_PAGE_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1b2430;
  --muted: #5c6776; --grid: #e7eaee; --axis: #98a2af; --main: #1f6feb; --second: #d9730d;
  --other: #8a3ffc; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1419; --card: #171d24; --text: #e3e8ee;
  --muted: #95a1af; --grid: #262e38; --axis: #55606d; --main: #5b9dff; --second: #f2a154;
  --other: #b78bff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 32px 0 12px; font-size: 18px; }
.lead { margin: 4px 0 20px; color: var(--muted); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 20px; font-weight: 600; white-space: nowrap; }
.tile span { color: var(--muted); font-size: 13px; }
.tile b.none { font-size: 15px; line-height: 2; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.card { margin: 0; padding: 14px 16px 10px; break-inside: avoid; }
.card.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.scroll { padding: 4px 16px; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 7px 12px 7px 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--grid); }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 500; }
thead th { color: var(--muted); font-size: 13px; }
td.value { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.note, .none { color: var(--muted); font-weight: 400; }
td.note { font-size: 13px; }
.warning { border-left: 3px solid var(--second); padding: 6px 12px; margin: 12px 0; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "Cascadia Mono", monospace; }
summary { cursor: pointer; padding: 8px 0; }
@media screen and (max-width: 760px) { .charts { grid-template-columns: 1fr; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --text: #000;
  --muted: #444; --grid: #ddd; --axis: #777; --main: #1f6feb; --second: #c2600a;
  --other: #7a2ff0; } main { padding: 0; max-width: none; } body { font-size: 12px; }
  h2 { break-after: avoid; } }
"""


def write_report(
    run_dir: Path, compare_dir: Path | None = None, output: Path | None = None
) -> Path:
    """Read a run, and perhaps one to compare it with, and write the page; returns its path.

    Args:
        run_dir: folder of the run.
        compare_dir: folder of another run, drawn into the same charts.
        output: file to write; default: `report.html` in `run_dir`.

    Raises:
        UserError: when a folder holds no run, a file in it cannot be read, or the page not written.
    """
    run = read_run(run_dir)
    other = None if compare_dir is None else read_run(compare_dir)
    path = run_dir / REPORT_FILE if output is None else output
    try:
        write_text_atomically(path, render_report(run, other))
    except OSError as error:
        raise UserError(
            str(path),
            f"the report cannot be written ({error.strerror})",
            "Give --output a file in a folder that exists and can be written to.",
        ) from error
    return path


def render_report(run: RunLog, other: RunLog | None = None) -> str:
    """The page as text."""
    names = _names(run, other)
    body = [
        f"<h1>{escape(names[0])}</h1>",
        f'<p class="lead">{escape(_subtitle(run))}</p>',
        _warnings(run),
        _tiles(headline(run)),
        "<h2>Curves</h2>",
        _cards(run, other, names),
        "<h2>Figures</h2>",
        _figure_table(run, other, names),
        "<h2>Layout</h2>",
        _layout_table(run),
        _difference_table(run, other, names),
        _event_table(run),
        _config_block(run),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names[0])} - Litespark run report</title>"
        f"<style>{_PAGE_STYLE}{CHART_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _names(run: RunLog, other: RunLog | None) -> tuple[str, str]:
    """Names of both runs, by their folders too where the names are the same."""
    if other is None:
        return run.name, ""
    if run.name != other.name:
        return run.name, other.name
    return (f"{run.name} ({run.folder.name})", f"{other.name} ({other.folder.name})")


def _section(run: RunLog, key: str) -> dict[str, Any]:
    section = run.config.get(key)
    return section if isinstance(section, dict) else {}


def _subtitle(run: RunLog) -> str:
    """Task, model and size in one line, as far as the configuration tells."""
    model = _section(run, "model")
    parts = [str(part) for part in (run.config.get("task"), model.get("preset")) if part]
    sizes = [model.get(key) for key in _Shape._fields]
    known = [size for size in sizes if isinstance(size, int) and 0 < size <= _LARGEST_SIZE]
    if len(known) == len(sizes):
        shape = _Shape(*known)
        options = (bool(model.get(key)) for key in ("tie_embeddings", "qkv_bias", "qk_norm"))
        parameters = total_parameters(shape, *options)
        parts.append(f"{large_count(parameters)} parameters")
        length = _section(run, "data").get("sequence_length")
        if isinstance(length, int) and 0 < length <= _LARGEST_SIZE:
            work = flops_per_token(shape, length, causal=True)
            parts.append(f"{length} tokens a sequence, {work / 1e9:.4g} GFLOP a token (causal)")
            if _section(run, "data").get("document_mask") is True:
                parts[-1] += " or less, by document masks"
    return " · ".join(parts) or "Litespark run report"


def _warnings(run: RunLog) -> str:
    texts = []
    if run.non_finite_losses:
        texts.append(f"The loss was not finite at {run.non_finite_losses:,} logged steps.")
    if run.is_cut_short:
        texts.append("The last line of a file is incomplete: the run is going on or was killed.")
    return "".join(f'<p class="warning">{text}</p>' for text in texts)


def _tiles(figures: Sequence[Figure]) -> str:
    shown = (
        "Training loss, last",
        "Validation loss, last",
        "Tokens",
        "Tokens per second",
        "MFU",
        "Energy per 1k tokens",
    )
    by_label = {figure.label: figure for figure in figures}
    tiles = []
    for label in shown:
        figure = by_label[label]
        kind = ' class="none"' if figure.value is None else ""
        tiles.append(f'<div class="tile"><b{kind}>{figure.text}</b><span>{label}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _figure_table(run: RunLog, other: RunLog | None, names: tuple[str, str]) -> str:
    others = {} if other is None else {figure.label: figure for figure in headline(other)}
    head = ["", names[0], *((names[1], "relative change") if other else ()), "how it is measured"]
    rows = []
    for figure in headline(run):
        cells = [_value_cell(figure)]
        if other is not None:
            twin = others.get(figure.label)
            cells += [_value_cell(twin), f'<td class="value">{_change(figure, twin)}</td>']
        note = f'<td class="note">{escape(figure.note)}</td>'
        rows.append(f"<tr><th>{escape(figure.label)}</th>{''.join(cells)}{note}</tr>")
    titles = "".join(f"<th>{escape(short_name(title))}</th>" for title in head)
    return (
        f'<div class="card scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _value_cell(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return '<td class="value none">not measured</td>'
    return f'<td class="value">{escape(figure.text)}</td>'


def _change(figure: Figure, twin: Figure | None) -> str:
    """This run against the other one, in percent of the other."""
    if twin is None or figure.value is None or not twin.value:
        return ""
    percent = round(100 * (figure.value / twin.value - 1), 1)
    return f"{percent:+.1f} %" if percent else "none"


def _cards(run: RunLog, other: RunLog | None, names: tuple[str, str]) -> str:
    """The charts that have something to show, and the names of those that have not."""
    cards, missing = [], []
    for chart in run_charts(run, other, names):
        if picture := line_chart(chart):
            kind = "card wide" if chart.width == WIDE else "card"
            caption = f"<figcaption>{escape(chart.title)}</figcaption>"
            cards.append(f'<figure class="{kind}">{caption}{picture}</figure>')
        else:
            missing.append(chart.title)
    note = f'<p class="none">Not measured: {", ".join(missing)}.</p>' if missing else ""
    return f'<div class="charts">{"".join(cards)}</div>{note}'


def _layout_table(run: RunLog) -> str:
    """How the run was split and what it was made of, from the resolved configuration."""
    rows = []
    for section in ("parallel", "precision", "batch", "optimizer", "schedule", "training"):
        pairs = ", ".join(f"{key} {_plain(value)}" for key, value in _section(run, section).items())
        if pairs:
            rows.append(f"<tr><th>{section}</th><td>{escape(pairs)}</td></tr>")
    if not rows:
        return f'<p class="none">The folder holds no {CONFIG_FILE} that tells the layout.</p>'
    return f'<div class="card scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'


def _difference_table(run: RunLog, other: RunLog | None, names: tuple[str, str]) -> str:
    """The keys in which two configurations differ: what a comparison is about."""
    if other is None:
        return ""
    mine, theirs = _flat(run.config), _flat(other.config)
    keys = [key for key in sorted(mine | theirs) if mine.get(key) != theirs.get(key)]
    if not keys:
        return '<p class="none">Both runs have the same configuration.</p>'
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(mine.get(key, '-'))}</td>"
        f"<td>{escape(theirs.get(key, '-'))}</td></tr>"
        for key in keys[:_MAX_DIFFERENCES]
    )
    left_out = len(keys) - _MAX_DIFFERENCES
    note = f'<p class="none">{left_out:,} more keys differ.</p>' if left_out > 0 else ""
    titles = "".join(f"<th>{escape(short_name(name))}</th>" for name in ("", *names))
    return (
        '<h2>Differences in the configuration</h2><div class="card scroll"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The configuration as dotted keys, as they are typed on the command line."""
    flat: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: object) -> str:
    """A value of the configuration as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _event_table(run: RunLog) -> str:
    if not run.events:
        return ""
    rows = "".join(
        f'<tr><td class="value">{"" if e.step is None else f"{e.step:,}"}</td>'
        f"<td>{escape(e.name)}</td><td>{escape(e.detail)}</td></tr>"
        for e in run.events[-_MAX_EVENTS:]
    )
    left_out = len(run.events) - _MAX_EVENTS
    note = f'<p class="none">{left_out:,} earlier events are not shown.</p>' if left_out > 0 else ""
    return (
        '<h2>Events</h2><div class="card scroll"><table><thead><tr><th>step</th><th>event</th>'
        f"<th>detail</th></tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _config_block(run: RunLog) -> str:
    if not run.config_text:
        return ""
    return (
        f"<h2>Configuration</h2><details><summary>{CONFIG_FILE}, as resolved</summary>"
        f'<div class="card scroll"><pre>{escape(run.config_text)}</pre></div></details>'
    )
