"""The part of a report about energy: what it was used for, and what it means in kWh and CO2e."""

from __future__ import annotations

import math
from html import escape
from typing import Any, NamedTuple

from litespark.metering.run_log import ENERGY_KEYS, RunLog

_JOULES_PER_KILOWATT_HOUR = 3.6e6
_NAMES = {
    "energy_joules": "training",
    "evaluation_joules": "evaluation",
    "checkpoint_joules": "checkpoints",
    "idle_joules": "starting, between steps",
    "host_joules": "the hosts' processors and memory",
}

ENERGY_STYLE = """
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; margin: 10px 0 4px;
  background: var(--grid); }
.bar i { display: block; height: 100%; }
.bar .energy_joules, .dot.energy_joules { background: var(--main); }
.bar .evaluation_joules, .dot.evaluation_joules { background: var(--second); }
.bar .checkpoint_joules, .dot.checkpoint_joules { background: var(--other); }
.bar .idle_joules, .dot.idle_joules { background: var(--axis); }
.bar .host_joules, .dot.host_joules { background: #2f9e6e; }
.bar .lost_joules, .dot.lost_joules { background: #d64545; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
"""


class EnergyShare(NamedTuple):
    """Joules of one purpose over the whole run."""

    key: str
    name: str
    joules: float


def energy_shares(run: RunLog) -> list[EnergyShare]:
    """What was measured, by purpose, the last evaluation and checkpoint and lost steps included."""
    shares = []
    for key in ENERGY_KEYS:
        values = run.finite(key) + run.tail_joules.get(key, [])
        if values and sum(values) > 0:
            shares.append(EnergyShare(key, _NAMES[key], math.fsum(values)))
    if run.lost_joules > 0:
        shares.append(
            EnergyShare("lost_joules", "steps that were lost and done again", run.lost_joules)
        )
    return shares


def energy_section(run: RunLog) -> str:
    """A bar and a table; nothing where no energy was measured."""
    shares = energy_shares(run)
    if not shares:
        return ""
    total = math.fsum(share.joules for share in shares)
    bar = "".join(
        f'<i class="{share.key}" style="width:{100 * share.joules / total:.2f}%"></i>'
        for share in shares
    )
    rows = "".join(
        f'<tr><th><span class="dot {share.key}"></span>{escape(share.name)}</th>'
        f'<td class="value">{_kilowatt_hours(share.joules)}</td>'
        f'<td class="value">{100 * share.joules / total:.1f} %</td></tr>'
        for share in shares
    )
    rows += (
        f'<tr><th>in all</th><td class="value">{_kilowatt_hours(total)}</td>'
        f'<td class="note">{escape(_carbon(run, total))}</td></tr>'
    )
    return (
        f'<h2>Energy</h2><div class="card scroll"><div class="bar">{bar}</div>'
        f"<table><tbody>{rows}</tbody></table>{_checks(run)}</div>"
    )


def modules_section(run: RunLog) -> str:
    """Which class filled each slot of the layers, and whose it is."""
    detail = next((e.fields for e in reversed(run.events) if e.name == "modules"), {})
    rows = "".join(
        f"<tr><th>{escape(str(slot))}</th><td>{escape(str(kind))}</td></tr>"
        for slot, kind in detail.items()
    )
    if not rows:
        return ""
    return f'<h2>Modules</h2><div class="card scroll"><table><tbody>{rows}</tbody></table></div>'


def _carbon(run: RunLog, joules: float) -> str:
    measured = len(run.finite("energy_joules"))
    if measured < len(run.steps):
        return f"measured at {measured:,} of {len(run.steps):,} lines: the run used more"
    section = run.config.get("metering")
    grams = section.get("grid_grams_per_kwh") if isinstance(section, dict) else None
    if not isinstance(grams, int | float) or isinstance(grams, bool) or grams <= 0:
        return "GPUs, and hosts where they could be read; no cooling, no network"
    kilograms = joules / _JOULES_PER_KILOWATT_HOUR * grams / 1000
    return f"{kilograms:,.3g} kg CO2e at {grams:g} g/kWh (metering.grid_grams_per_kwh)"


def _checks(run: RunLog) -> str:
    """Polled power, integrated, where the run asked for it."""
    found: Any = next((e.fields for e in reversed(run.events) if e.name == "energy"), {})
    integral, counter = found.get("integrated"), found.get("gpu_joules")
    if not isinstance(integral, dict) or not isinstance(counter, int | float) or not counter:
        return ""
    joules, doubt = integral.get("joules"), integral.get("uncertainty_joules")
    if not isinstance(joules, int | float) or not isinstance(doubt, int | float):
        return ""
    return (
        f'<p class="none">The counters say {_kilowatt_hours(counter)}, the integral of polled '
        f"power {_kilowatt_hours(joules)} ± {_kilowatt_hours(doubt)}: "
        f"{100 * (joules / counter - 1):+.1f} %.</p>"
    )


def _kilowatt_hours(joules: float) -> str:
    if joules < 0.01 * _JOULES_PER_KILOWATT_HOUR:
        return f"{joules / 1000:,.3g} kJ" if joules >= 1000 else f"{joules:.3g} J"
    kilowatt_hours = joules / _JOULES_PER_KILOWATT_HOUR
    if kilowatt_hours < 1000:
        return f"{kilowatt_hours:,.3g} kWh"
    return f"{kilowatt_hours / 1000:,.3g} MWh"
