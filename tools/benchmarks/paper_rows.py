"""The technical report's twelve rows: configurations, predictions, and what physics allows.

    python -m tools.benchmarks.paper_rows            # prints the table
    python -m tools.benchmarks.paper_rows --write    # examples/paper/*.yaml, docs/paper.md, plots

The report: arXiv 2510.02483, tables 3 to 6, on nodes of 8 H200.  Its "Litespark" rows are planned
as ours in FP8 with the best layout that the planner finds, its "Llama" rows as plain torch in BF16
with data and tensor parallelism alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from litespark.config.load import load_config
from litespark.config.schema import RunConfig
from litespark.metering.flops import flops_per_token
from litespark.metering.plan.calibration import Calibration, load_calibration
from litespark.metering.plan.communication import network_of
from litespark.metering.plan.search import Cluster, Plan, search
from litespark.metering.plan.time import step_time

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "paper"
DOCUMENT = ROOT / "docs" / "paper.md"
RESULT = Path(__file__).parent / "results" / "paper_rows.json"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"

TOKENS = 500e9
_BF16_PEAK, _FP8_PEAK, _WATTS = 989.0, 1979.0, 700.0
# Plain torch (HF Transformers, SDPA, eager, micro-batch 4) on one H200, measured by us: paper-3b.
_PLAIN_TOKENS_PER_SECOND = 27_337
_SDPA_TFLOPS = 250.0  # torch's flash backend at 4096, head size 128, measured on one H100


@dataclass(frozen=True)
class Claim:
    """A row of the report's tables: tokens/s of all GPUs, MWh for 500 B tokens."""

    model: str
    gpus: int
    who: str
    tokens_per_second: float
    megawatt_hours: float

    @property
    def name(self) -> str:
        """Of the configuration's file."""
        return f"{self.model}-{self.gpus}-{self.who}"


CLAIMS = tuple(
    Claim(*row)
    for row in (
        ("3b", 8, "litespark", 439_644.81, 0.79),
        ("3b", 8, "llama", 218_967.60, 1.75),
        ("3b", 16, "litespark", 862_899.88, 0.80),
        ("3b", 16, "llama", 396_768.52, 1.80),
        ("3b", 128, "litespark", 1_387_342.21, 1.65),
        ("3b", 128, "llama", 364_328.66, 5.44),
        ("3b", 256, "litespark", 964_981.24, 3.41),
        ("3b", 256, "llama", 428_056.25, 8.01),
        ("30b", 256, "litespark", 471_486.24, 125.35),
        ("30b", 256, "llama", 99_604.57, 732.08),
        ("30b", 512, "litespark", 508_260.62, 189.47),
        ("30b", 512, "llama", 79_891.47, 751.75),
    )
)


def config_of(claim: Claim, cluster: Cluster) -> RunConfig:
    """The row as a configuration with its layout."""
    base = load_config(ROOT / "examples" / "pretrain" / f"paper-{claim.model}.yaml")
    is_plain = claim.who == "llama"
    run = base.run.model_copy(
        update={"name": f"paper-{claim.name}", "output_dir": f"runs/paper/{claim.name}"}
    )
    precision = base.precision.model_copy(update={"mode": "bf16" if is_plain else "fp8"})
    config = base.model_copy(update={"run": run, "precision": precision})
    if not is_plain:
        training = base.training.model_copy(update={"cuda_graph": True})
        return search(config.model_copy(update={"training": training}), cluster)[0].config
    tensor = 1 if claim.model == "3b" else 8
    replicas = claim.gpus // tensor
    parallel = base.parallel.model_copy(
        update={
            **{"tensor": tensor, "pipeline": 1, "virtual_pipeline": 1, "context": 1},
            **{"sequence": False, "distributed_optimizer": True},
            **{"overlap_grad_reduce": False, "overlap_param_gather": False},
        }
    )
    batch = base.batch.model_copy(update={"micro": min(4, base.batch.global_ // replicas)})
    training = base.training.model_copy(update={"recompute": "none"})
    model = base.model.model_copy(update={"backend": "reference"})
    update = {"parallel": parallel, "batch": batch, "training": training, "model": model}
    return config.model_copy(update=update)


def plain_calibration() -> Calibration:
    """Plain torch on an H200: what is left of its measured step is traffic between products."""
    known = load_calibration("h200-sxm")
    rates = tuple(rate.model_copy(update={"tflops": _SDPA_TFLOPS}) for rate in known.attention)
    known = known.model_copy(update={"attention": rates})
    config = load_config(
        ROOT / "examples" / "pretrain" / "paper-3b.yaml",
        ["batch.micro=4", "batch.global=32"],
    )
    step = step_time(config, 1, known, network_of("efa", 8))
    measured = config.tokens_per_step / _PLAIN_TOKENS_PER_SECOND
    share = known.memory_share["bf16"] * step.between / (step.between + measured - step.total)
    update: dict[str, Any] = {"memory_share": {"bf16": share}, "stack": "plain torch"}
    update["host_seconds_per_launch"] = None  # of that stack it has not been measured
    return known.model_copy(update=update)


def judge(claim: Claim) -> dict[str, Any]:
    """A row: claimed, predicted, and what the hardware's limits say of the claim."""
    calibration = plain_calibration() if claim.who == "llama" else load_calibration("h200-sxm")
    cluster = Cluster(claim.gpus, calibration, network_of("efa", 8))
    config = config_of(claim, cluster)
    plan = Plan(config, cluster)
    work = flops_per_token(config.model, config.data.sequence_length, causal=True)
    rate = claim.tokens_per_second / claim.gpus
    hours = TOKENS / claim.tokens_per_second / 3600
    return {
        **asdict(claim),
        "name": claim.name,
        "layout": [
            *plan.overrides(),
            f"training.cuda_graph={str(config.training.cuda_graph).lower()}",
        ],
        "claimed_tokens_per_second_per_gpu": rate,
        "claimed_tflops_causal": rate * work / 1e12,
        "claimed_watts_per_gpu": claim.megawatt_hours * 1e6 / (claim.gpus * hours),
        "claimed_joules_per_token": claim.megawatt_hours * 3.6e9 / TOKENS,
        "least_joules_per_token_bf16": work / (_BF16_PEAK * 1e12) * _WATTS,
        "least_joules_per_token_fp8": work / (_FP8_PEAK * 1e12) * _WATTS,
        "predicted_tokens_per_second_per_gpu": plan.tokens_per_second / claim.gpus,
        "predicted_mfu": plan.mfu,
        "predicted_gib": plan.memory.needed / 2**30,
        "predicted_megawatt_hours": plan.megawatt_hours(TOKENS),
        "predicted_days": plan.days(TOKENS),
        "verdict": "",
    }


def verdict(row: dict[str, Any]) -> str:
    """What of the claim is physically possible."""
    texts = []
    if row["claimed_watts_per_gpu"] > _WATTS:
        texts.append(f"{row['claimed_watts_per_gpu']:,.0f} W from a GPU capped at 700: impossible")
    elif row["claimed_joules_per_token"] < row["least_joules_per_token_bf16"]:
        at_cap = row["least_joules_per_token_bf16"]
        texts.append(
            f"energy is {row['claimed_joules_per_token'] / at_cap:.2f} of what BF16 costs at its "
            "peak and 700 W: not credible"
        )
    elif row["claimed_watts_per_gpu"] < 200:
        texts.append(f"{row['claimed_watts_per_gpu']:.0f} W: little above an idle GPU's 80-120")
    if row["claimed_tflops_causal"] > 600:
        texts.append("speed possible in FP8 alone, which is not mentioned")
    else:
        texts.append("speed possible")
    return "; ".join(texts)


def all_rows() -> list[dict[str, Any]]:
    """The twelve rows in the report's order."""
    rows = [judge(claim) for claim in CLAIMS]
    return [row | {"verdict": verdict(row)} for row in rows]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of the document."""
    lines = [
        "| row | claimed tokens/s/GPU | predicted | claimed W/GPU | claimed MWh | predicted MWh | "
        "of the claim |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model'].upper()}, {row['gpus']} GPUs, {row['who']} | "
            f"{row['claimed_tokens_per_second_per_gpu']:,.0f} | "
            f"{row['predicted_tokens_per_second_per_gpu']:,.0f} | "
            f"{row['claimed_watts_per_gpu']:,.0f} | {row['megawatt_hours']:.2f} | "
            f"{row['predicted_megawatt_hours']:.2f} | {row['verdict']} |"
        )
    lines += ["", "| configuration | layout | GiB | MFU | days for 500 B tokens |"]
    lines.append("|---|---|--:|--:|--:|")
    for row in rows:
        keys = dict(word.split("=") for word in row["layout"])
        shown = " ".join(
            f"{short}{keys[f'parallel.{name}']}"
            for short, name in (
                *(("TP", "tensor"), ("PP", "pipeline")),
                *(("VPP", "virtual_pipeline"), ("CP", "context")),
            )
            if keys[f"parallel.{name}"] != "1"
        )
        shown = f"{shown or 'DP'}, micro {keys['batch.micro']}"
        if keys["training.recompute"] != "none":
            shown += f", recompute {keys['training.recompute']}"
        lines.append(
            f"| `{row['name']}.yaml` | {shown} | "
            f"{row['predicted_gib']:.1f} | {100 * row['predicted_mfu']:.1f} % | "
            f"{row['predicted_days']:.1f} |"
        )
    return "\n".join(lines)


def write_configs(rows: list[dict[str, Any]]) -> None:
    """examples/paper/<row>.yaml: the pre-training example with the row's layout and formats."""
    EXAMPLES.mkdir(parents=True, exist_ok=True)
    for row in rows:
        base = ROOT / "examples" / "pretrain" / f"paper-{row['model']}.yaml"
        tree = yaml.safe_load(base.read_text(encoding="utf-8"))
        tree["run"] = {"name": f"paper-{row['name']}", "output_dir": f"runs/paper/{row['name']}"}
        for word in row["layout"]:
            key, value = word.split("=")
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = yaml.safe_load(value)
        tree["precision"] = {"mode": "bf16" if row["who"] == "llama" else "fp8"}
        if row["who"] == "llama":
            tree["model"]["backend"] = "reference"
        who = "plain torch in BF16" if row["who"] == "llama" else "the planner's best layout"
        head = (
            f"# The report's row {row['model'].upper()}, {row['gpus']} GPUs, {row['who']}: {who}.\n"
            f"# litespark plan examples/paper/{row['name']}.yaml --gpus {row['gpus']} "
            "--gpu h200-sxm --network efa\n"
        )
        text = head + yaml.safe_dump(tree, sort_keys=False)
        (EXAMPLES / f"{row['name']}.yaml").write_text(text, encoding="utf-8")


def draw(rows: list[dict[str, Any]]) -> None:
    """Two bar charts beside the document: speed and power, claimed beside predicted or possible."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "litespark", "font.size": 9, "axes.spines.top": False}
    plt.rcParams["axes.spines.right"] = False
    labels = [f"{row['model'].upper()}\n{row['gpus']}\n{row['who']}" for row in rows]
    places = range(len(rows))
    figure, axes = plt.subplots(figsize=(10, 3.6))
    claimed = [row["claimed_tokens_per_second_per_gpu"] for row in rows]
    predicted = [row["predicted_tokens_per_second_per_gpu"] for row in rows]
    axes.bar([x - 0.2 for x in places], claimed, 0.4, label="claimed", color="#9aa7b8")
    axes.bar([x + 0.2 for x in places], predicted, 0.4, label="predicted", color="#1f6feb")
    axes.set_yscale("log")
    _finish(figure, axes, labels, "tokens/s per GPU (logarithmic)", "paper_throughput.svg")
    figure, axes = plt.subplots(figsize=(10, 3.6))
    watts = [row["claimed_watts_per_gpu"] for row in rows]
    colours = ["#d9480f" if value > _WATTS else "#9aa7b8" for value in watts]
    axes.bar(places, watts, 0.6, color=colours, label="claimed energy / claimed time")
    axes.axhline(_WATTS, color="#d9480f", linewidth=1, label="cap of the GPU, 700 W")
    axes.axhspan(674, 698, color="#1f6feb", alpha=0.35, label="measured by us while training")
    _finish(figure, axes, labels, "W per GPU", "paper_power.svg")


def _finish(figure: Any, axes: Any, labels: list[str], y_label: str, name: str) -> None:
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(DOCUMENT.parent / name, metadata={"Date": None})


def main() -> int:
    """Print, and with --write keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="configurations, tables and plots")
    args = parser.parse_args()
    rows = all_rows()
    print(markdown(rows))
    if args.write:
        write_configs(rows)
        RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        draw(rows)
        text = DOCUMENT.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        tail = rest.split(END)[1]
        DOCUMENT.write_text(f"{head}{BEGIN}\n{markdown(rows)}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
