"""What `litespark plan` prints: the best layouts, what fills their memory and time, the losers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from litespark.config.validate import validate
from litespark.metering.plan.search import Plan, best_of_each_kind

_SHOWN = 5
_LOSERS = 10
_FILE_WIDTH = 140
_NOTED_SHARE = 0.02  # of a step that waits for the host
_GIBIBYTE = 2**30
_MEMORY_PARTS = (
    *("weights", "gradients", "optimizer", "fp8_copies"),
    *("activations", "temporary", "fragmentation", "outside"),
)
_TIME_PARTS = (
    *("products", "attention", "between", "gaps", "host", "recompute", "tensor"),
    *("context", "transfer", "bubble", "data", "optimizer"),
)


def print_plans(plans: Sequence[Plan], written: Plan | None, tokens: float, seconds: float) -> None:
    """Print the tables of plans in the order of `search`; `written` is the configuration's own."""
    # A file or a pipe has no width, and cut columns say nothing.
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(soft_wrap=False, width=None if has_width else _FILE_WIDTH)
    fitting = [plan for plan in plans if plan.fits]
    best = best_of_each_kind(fitting, _SHOWN)
    cluster, config = plans[0].cluster, plans[0].config
    console.print(
        f"{config.model.preset or 'model'}, {config.precision.mode}, "
        f"{config.batch.global_} x {config.data.sequence_length} tokens a step, on {cluster.gpus} "
        f"{cluster.calibration.gpu} ({cluster.network.gpus_per_node} a node, "
        f"{cluster.network.name}): {len(plans):,} layouts in {seconds:.1f} s, "
        f"{len(fitting):,} fit",
        highlight=False,
    )
    shown = [(str(number), plan) for number, plan in enumerate(best, 1)]
    if written is not None:
        shown.append(("as written", written))
    if not shown:
        console.print("No layout fits.")
    else:
        console.print(_main_table(shown, tokens))
        console.print(_parts_table(shown))
    console.print(_loser_table(plans, best))
    if best:
        console.print("To take the first:", highlight=False)
        console.print("  " + " ".join(best[0].overrides()), highlight=False, soft_wrap=True)
        if _gains_from_recording(best[0]):
            console.print(
                "Its GPUs wait for the host that launches their kernels: add "
                "training.cuda_graph=true, to the configuration or to this command.",
                highlight=False,
                soft_wrap=True,
            )


def _gains_from_recording(plan: Plan) -> bool:
    """Whether the step waits for its host, and could be recorded."""
    if plan.step.host < _NOTED_SHARE * plan.step.total:
        return False
    training = plan.config.training.model_copy(update={"cuda_graph": True})
    recorded = plan.config.model_copy(update={"training": training})
    return not validate(recorded, plan.cluster.gpus)


def name_of(plan: Plan) -> str:
    """The degrees in a few words."""
    parallel = plan.config.parallel
    parts = [f"TP{parallel.tensor}"]
    if parallel.pipeline > 1:
        parts.append(f"PP{parallel.pipeline}")
        if parallel.virtual_pipeline > 1:
            parts.append(f"VPP{parallel.virtual_pipeline}")
    if parallel.context > 1:
        parts.append(f"CP{parallel.context}")
    parts.append(f"DP{plan.config.data_parallel_size(plan.cluster.gpus)}")
    return " ".join(parts)


def _main_table(shown: list[tuple[str, Plan]], tokens: float) -> Table:
    table = Table(title=None, show_edge=False, pad_edge=False)
    for name in ("", "layout", "micro", "recompute"):
        table.add_column(name, no_wrap=True)
    heads = ("tokens/s", "per GPU", "MFU", "GiB", "J/1000 tok", "days", "MWh")
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for label, plan in shown:
        table.add_row(
            label,
            name_of(plan),
            f"{plan.config.batch.micro}",
            plan.config.training.recompute,
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.tokens_per_second / plan.cluster.gpus:,.0f}",
            "-" if plan.mfu is None else f"{100 * plan.mfu:.1f} %",
            f"{plan.memory.needed / _GIBIBYTE:.1f}" + ("" if plan.fits else " too much"),
            f"{1000 * plan.joules_per_token:.2f}",
            f"{plan.days(tokens):.3g}",
            f"{plan.megawatt_hours(tokens):.3g}",
        )
    return table


def _parts_table(shown: list[tuple[str, Plan]]) -> Table:
    """Where the memory and the time of each go."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("GiB of the fullest rank", no_wrap=True)
    for label, _ in shown:
        table.add_column(label, justify="right")
    for part in _MEMORY_PARTS:
        values = [plan.memory.as_record()[part] / _GIBIBYTE for _, plan in shown]
        if any(values):
            table.add_row(part.replace("_", " "), *(f"{value:.2f}" for value in values))
    table.add_section()
    table.add_row("% of a step", *("" for _ in shown))
    for part in _TIME_PARTS:
        values = [100 * plan.step.as_record()[part] / plan.step.total for _, plan in shown]
        if any(value >= 0.05 for value in values):
            table.add_row(part, *(f"{value:.1f}" for value in values))
    table.add_row("step, seconds", *(f"{plan.step.total:.3g}" for _, plan in shown))
    return table


def _loser_table(plans: Sequence[Plan], best: Sequence[Plan]) -> Table:
    """The nearest losers of each kind: slower ones, and those that do not fit."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("others", no_wrap=True)
    table.add_column("why not")
    slower = best_of_each_kind([p for p in plans if p.fits], len(best) + _LOSERS)[1:]
    too_large = best_of_each_kind([p for p in plans if not p.fits], _LOSERS // 2)
    for plan in [*slower[:_LOSERS], *too_large]:
        extra = f"micro {plan.config.batch.micro}, {plan.config.training.recompute}"
        table.add_row(f"{name_of(plan)}, {extra}", plan.verdict)
    return table
