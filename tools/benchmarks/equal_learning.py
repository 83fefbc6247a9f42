"""Do FP8, and the fused blocks, learn what plain BF16 learns?  Same seed, same samples, same steps.

Trains one model several times through `litespark train`, one run after the other, and compares the
training losses step by step (smoothed by a centred mean over a fiftieth of the run, the same as in
`litespark report`) and the validation losses.  A run of another seed shows what a difference is
worth: two seeds see other samples and begin with other weights.

    python tools/benchmarks/equal_learning.py --data P_text_document --tokens 100000000 \
        --runs bf16-triton fp8-triton bf16-reference bf16-triton:seed=2 --out runs/equal_learning

Writes OUT/<run>/ (ordinary run folders), OUT/equal_learning.{json,csv} and two pictures.  A run
whose folder is complete is not repeated, so that the script may be started again for more runs;
with --no-train nothing is trained, and a run that was cut off is compared as far as it went.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from litespark.metering.charts import smoothed
from litespark.metering.svg import CHART_STYLE, Chart, Series, line_chart

STYLES = ("main", "other", "second", "other2", "raw")
COLOURS = (
    ":root{--main:#2563eb;--other:#dc2626;--second:#059669;--muted:#555;--text:#111;"
    "--grid:#ddd;--axis:#888}"
)


def main() -> int:
    """Train what is missing, compare, write."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for run in arguments.runs if arguments.train else []:
        train(run, arguments)
    found = {run: read_run(folder_of(run, arguments)) for run in arguments.runs}
    baseline = arguments.baseline or arguments.runs[0]
    summary = {
        "model": arguments.model,
        "tokens": arguments.tokens,
        "tokens_per_step": arguments.global_batch * arguments.sequence_length,
        "baseline": baseline,
        "skipped_warmup_steps": arguments.warmup,
        "runs": {
            run: compare(found[run], found[baseline], arguments.warmup) for run in arguments.runs
        },
    }
    (arguments.out / "equal_learning.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_curves(arguments.out, found, arguments.warmup, baseline)
    print(json.dumps(summary, indent=2))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="prefix of a shard; not needed with --no-train")
    parser.add_argument("--runs", nargs="+", required=True, help="PRECISION-BACKEND[:key=value,..]")
    parser.add_argument("--baseline", help="the run to compare with; default: the first")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default="llama-160m", help="preset")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="training tokens")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--micro-batch", type=int, default=32, help="samples of a forward pass")
    parser.add_argument("--global-batch", type=int, default=64, help="samples of a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="warm-up steps, not compared")
    parser.add_argument(
        "--train",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train what is missing (default), or only compare what is there",
    )
    parser.add_argument("--eval-every", type=int, default=250, help="steps between validations")
    arguments = parser.parse_args()
    if arguments.train and not arguments.data:
        parser.error("--data is needed to train")
    return arguments


def folder_of(run: str, arguments: argparse.Namespace) -> Path:
    """The run's folder."""
    return arguments.out / run.replace(":", "_").replace("=", "").replace(",", "_")


def train(run: str, arguments: argparse.Namespace) -> None:
    """Train one run to its end, or go on with it."""
    name, _, extra = run.partition(":")
    precision, backend = name.split("-")
    folder = folder_of(run, arguments)
    overrides = [pair for pair in extra.split(",") if pair]
    config = {
        "run": {"name": run, "output_dir": str(folder)},
        "model": {"preset": arguments.model, "backend": backend},
        "precision": {"mode": precision},
        "data": {
            "blend": [{"prefix": arguments.data}],
            "split": [98, 2, 0],
            "sequence_length": arguments.sequence_length,
        },
        "batch": {"micro": arguments.micro_batch, "global": arguments.global_batch},
        "optimizer": {"lr": arguments.lr},
        "schedule": {
            "kind": "cosine",
            "warmup_steps": arguments.warmup,
            "min_lr": arguments.lr / 10,
        },
        "training": {
            "tokens": arguments.tokens,
            "eval_every": arguments.eval_every,
            "eval_steps": 8,
        },
        "logging": {"tensorboard": False},
    }
    path = arguments.out / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "litespark", "train", str(path), *overrides]
    subprocess.run(command, check=True)


def read_run(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Training and validation losses of a run, by step."""
    train_losses: dict[int, float] = {}
    validation: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        if row.get("loss") is not None:
            train_losses[row["step"]] = row["loss"]
        if row.get("validation_loss") is not None:
            validation[row["step"]] = row["validation_loss"]
    return {"loss": sorted(train_losses.items()), "validation": sorted(validation.items())}


def compare(run: dict, baseline: dict, warmup: int) -> dict[str, float | None]:
    """Gaps of the smoothed losses, relative to the baseline; positive: worse than it.

    Both are taken as far as the shorter of them went, validation at its last step.
    """
    steps = [step for (step, _), _ in zip(baseline["loss"], run["loss"], strict=False)]
    ours = smoothed([loss for _, loss in run["loss"][: len(steps)]])
    theirs = smoothed([loss for _, loss in baseline["loss"][: len(steps)]])
    gaps = [(o - t) / t for s, o, t in zip(steps, ours, theirs, strict=True) if s > warmup]
    tail = max(1, len(gaps) // 50)
    wanted = dict(baseline["validation"])
    step, final = [pair for pair in run["validation"] if pair[0] in wanted][-1]
    return {
        "steps": len(steps),
        "final_smoothed_loss": ours[-1 - tail],
        "final_gap_percent": 100 * sum(gaps[-tail:]) / tail,
        "largest_gap_percent": 100 * max(gaps),
        "mean_gap_percent": 100 * sum(gaps) / len(gaps),
        "root_mean_square_gap_percent": 100 * math.sqrt(sum(g * g for g in gaps) / len(gaps)),
        "validation_step": step,
        "validation_loss": final,
        "validation_gap_percent": 100 * (final - wanted[step]) / wanted[step],
    }


def write_curves(out: Path, found: dict[str, dict], warmup: int, baseline: str) -> None:
    """Every step's loss of every run as CSV; smoothed losses and gaps as a picture."""
    losses_of = {name: dict(run["loss"]) for name, run in found.items()}
    with (out / "equal_learning.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *found])
        for step in sorted(set().union(*losses_of.values())):
            values = [losses_of[name].get(step) for name in found]
            writer.writerow([step, *("" if loss is None else f"{loss:.5f}" for loss in values)])
    losses, gaps = [], []
    for number, (name, run) in enumerate(found.items()):
        # Cut to one length first: how far a mean reaches depends on it.
        length = min(len(run["loss"]), len(found[baseline]["loss"]))
        curve = smoothed([loss for _, loss in run["loss"][:length]])
        base = smoothed([loss for _, loss in found[baseline]["loss"][:length]])
        shown = range(warmup, length)
        x = [float(run["loss"][i][0]) for i in shown]
        style = STYLES[number % len(STYLES)]
        losses.append(Series(name, x, [curve[i] for i in shown], style))
        gaps.append(Series(name, x, [100 * (curve[i] / base[i] - 1) for i in shown], style))
    charts = [
        Chart("Training loss, smoothed", "step", "nats per token", losses, []),
        Chart(f"Difference from {baseline}", "step", "% of the loss", gaps, []),
    ]
    for chart, suffix in zip(charts, ("loss", "gap"), strict=True):
        text = line_chart(chart)
        # A file of its own needs the namespace, which a picture inside a page does not.
        text = text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        styled = text.replace(">", f"><style>{COLOURS}{CHART_STYLE}</style>", 1)
        (out / f"equal_learning_{suffix}.svg").write_text(styled)


if __name__ == "__main__":
    sys.exit(main())
