"""Predict single-GPU runs with the planner, then measure them: memory, step time, joules.

    python -m tools.benchmarks.plan_validation --json result.json --budget-seconds 190
    python -m tools.benchmarks.plan_validation --layouts results/h200x4-paper-3b.json --gpu FILE

Each case is a `litespark bench` in a process of its own, started early so that it imports while the
case before it is measured.  A case that the planner says does not fit is left out, as is what the
budget leaves no time for; one that hangs or fails is reported and the next begins.  Predictions are
made before anything is measured and come from the built-in calibration of the GPU that is found.
With --layouts the layouts that `multi_gpu.py` has measured are predicted, afterwards.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from litespark.cli.bench import build_config
from litespark.cli.main import parse
from litespark.config.schema import RunConfig
from litespark.metering.plan.calibration import load_calibration
from litespark.metering.plan.communication import NETWORKS
from litespark.metering.plan.energy import step_joules
from litespark.metering.plan.fit import config_of
from litespark.metering.plan.memory import memory_plan
from litespark.metering.plan.time import step_time

Record = dict[str, Any]

_GIBIBYTE = 2**30
_CASE_SECONDS = 60.0
_WARMUP, _STEPS = 2, 4

# The most telling first.  name: options of `litespark bench`.
CASES: dict[str, str] = {
    "paper-3b bf16 mb2": "--model paper-3b --precision bf16 --micro-batch 2 --accumulate 4",
    "paper-3b fp8 mb4": "--model paper-3b --precision fp8 --micro-batch 4 --accumulate 4",
    "paper-3b bf16 mb4 full": "--model paper-3b --precision bf16 --micro-batch 4 --accumulate 4 "
    "training.recompute=full",
    "paper-3b bf16 mb2 selective": "--model paper-3b --precision bf16 --micro-batch 2 "
    "--accumulate 4 training.recompute=selective",
    "llama3.2-1b bf16 mb4": "--model llama3.2-1b --precision bf16 --micro-batch 4 --accumulate 4",
    "llama3.2-1b fp8 mb4 selective": "--model llama3.2-1b --precision fp8 --micro-batch 4 "
    "--accumulate 4 training.recompute=selective",
    "llama-160m bf16 mb16": "--model llama-160m --precision bf16 --micro-batch 16 --accumulate 8 "
    "--seq-length 2048",
    "llama-160m fp8 mb16": "--model llama-160m --precision fp8 --micro-batch 16 --accumulate 8 "
    "--seq-length 2048",
    "paper-3b fp8 mb8 full": "--model paper-3b --precision fp8 --micro-batch 8 --accumulate 2 "
    "training.recompute=full",
    "llama3.2-3b bf16 mb1": "--model llama3.2-3b --precision bf16 --micro-batch 1 --accumulate 8",
    "paper-3b fp8 tensorwise mb2": "--model paper-3b --precision fp8 --recipe tensorwise "
    "--micro-batch 2 --accumulate 4",
    # Too small for the GPU: what the host takes to launch a layer.
    "llama-160m bf16 mb1 s256": "--model llama-160m --precision bf16 --micro-batch 1 "
    "--accumulate 64 --seq-length 256",
}


@dataclass
class Child:
    """One case in its process, which waits for a line before it touches the GPU."""

    name: str
    process: subprocess.Popen[str]
    result: Path
    log: TextIO


def main() -> int:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write both figures of every case")
    parser.add_argument("--budget-seconds", type=float, default=190.0, help="for all (190)")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="these cases alone")
    parser.add_argument("--gpu", help="calibration (default: that of the GPU that is found)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try this script")
    parser.add_argument(
        "--repredict", type=Path, metavar="FILE", help="measure nothing: an earlier --json again"
    )
    parser.add_argument(
        "--layouts",
        type=Path,
        metavar="FILE",
        help="measure nothing: those of a multi_gpu.py --json",
    )
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args.child)
    if args.repredict is not None:
        kept = json.loads(args.repredict.read_text())
        return finish(repredict(kept, args.gpu or kept["gpu"]), kept["gpu"], args.json)
    if args.layouts is not None:
        kept = json.loads(args.layouts.read_text())
        gpu = args.gpu or gpu_of(kept["device"])
        return finish(layouts(kept, gpu), gpu, args.json)
    gpu = args.gpu or found_gpu()
    names = args.only or list(CASES)
    cases = {name: options_of(name, quick=args.quick) for name in names}
    predictions = {name: predict(options, gpu) for name, options in cases.items()}
    fitting = [name for name in names if predictions[name]["fits"]]
    with tempfile.TemporaryDirectory(prefix="plan-validation-") as folder:
        measured = measure_all({n: cases[n] for n in fitting}, Path(folder), args.budget_seconds)
    rows = {name: compare(predictions[name], measured.get(name)) for name in names}
    return finish(rows, gpu, args.json)


def finish(rows: dict[str, Record], gpu: str, path: Path | None) -> int:
    """Print the table and, with a path, keep it."""
    print_table(rows)
    if path is not None:
        path.write_text(json.dumps({"gpu": gpu, "cases": rows}, indent=1) + "\n")
    return 0


def repredict(kept: Record, gpu: str) -> dict[str, Record]:
    """The measured cases of an earlier result, predicted by the planner as it is now.

    The attention library is the one that the result's package versions allow.
    """
    rows = {}
    for name, row in kept["cases"].items():
        measured = row["measured"]
        if measured is not None and "error" not in measured:
            rows[name] = compare(predict_config(config_of(measured), gpu), measured)
    return rows


def layouts(kept: Record, gpu: str) -> dict[str, Record]:
    """Litespark's cases of a result of `multi_gpu.py`, predicted by the planner as it is now."""
    rows = {}
    for case in kept["cases"]:
        measured = case.get("result")
        if case["kind"] != "bench" or not measured:
            continue
        words = ["bench", *case["words"]]
        if "flash-attn-4" not in measured["versions"]:
            words.append("model.attention=cudnn")
        config = build_config(parse(words), case["gpus"])
        rows[case["name"]] = compare(predict_config(config, gpu, case["gpus"]), measured)
    return rows


def options_of(name: str, *, quick: bool) -> list[str]:
    """The words of `litespark bench` for a case."""
    common = f"--warmup {_WARMUP} --steps {_STEPS} --no-profile"
    if quick:
        shape = "model.num_layers=2 model.hidden_size=128 model.num_attention_heads=2"
        shape += " model.ffn_hidden_size=256 model.num_query_groups=2 model.head_dim=64"
        shape += " model.vocab_size=512 data.sequence_length=64"
        common = f"--warmup 1 --steps 1 --no-profile {shape}"
    return ["bench", *CASES[name].split(), *common.split()]


def found_gpu() -> str:
    """The built-in calibration of this machine's GPU."""
    import torch

    return gpu_of(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")


def gpu_of(device: str) -> str:
    """The built-in calibration of a device."""
    return "h200-sxm" if "H200" in device else "h100-sxm"


def predict(options: list[str], gpu: str) -> Record:
    """What the planner says of a case."""
    words = list(options)
    if importlib.util.find_spec("flash_attn") is None:  # then the choice at run time is cuDNN
        words.append("model.attention=cudnn")
    return predict_config(build_config(parse(words), 1), gpu)


def predict_config(config: RunConfig, gpu: str, gpus: int = 1) -> Record:
    """Memory of the fullest GPU, time and energy of a configuration on the GPUs of one host."""
    calibration = load_calibration(gpu)
    memory = memory_plan(config, gpus)
    seconds = step_time(config, gpus, calibration, NETWORKS["infiniband"])
    joules = gpus * step_joules(config, seconds, calibration)
    return {
        "fits": memory.needed <= calibration.memory_gib * _GIBIBYTE,
        "memory_gib": memory.peak / _GIBIBYTE,
        "step_seconds": seconds.total,
        "joules_per_1000_tokens": 1000 * joules / config.tokens_per_step,
        "memory_parts": memory.as_record(),
        "time_parts": seconds.as_record(),
    }


def run_child(words: list[str]) -> int:
    """Import everything, wait for the word, measure."""
    import litespark.training.benchmark  # noqa: F401
    from litespark.cli.main import main as litespark_main

    sys.stdin.readline()
    return litespark_main(words)


def measure_all(cases: dict[str, list[str]], folder: Path, budget_seconds: float) -> Record:
    """Results of the cases by name, as far as the budget goes."""
    deadline = time.monotonic() + budget_seconds
    names = list(cases)
    children: list[Child] = [start(names[0], cases, folder)] if names else []
    measured: Record = {}
    try:
        for index, name in enumerate(names):
            child = children[-1]
            left = deadline - time.monotonic()
            if left < 12:
                print(f"{name} and what follows: no time left", flush=True)
                break
            assert child.process.stdin is not None
            child.process.stdin.write("go\n")
            child.process.stdin.close()
            if index + 1 < len(names):
                children.append(start(names[index + 1], cases, folder))
            began = time.monotonic()
            measured[name] = result_of(child, min(left, _CASE_SECONDS))
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            child.log.close()
    return measured


def start(name: str, cases: dict[str, list[str]], folder: Path) -> Child:
    """Start a case's process, which imports and then waits."""
    result = folder / f"{len(list(folder.iterdir()))}.json"
    log = (folder / f"{result.stem}.log").open("w+", encoding="utf-8")
    command = [sys.executable, "-m", "tools.benchmarks.plan_validation", "--child"]
    process = subprocess.Popen(
        [*command, *cases[name], "--json", str(result)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Child(name, process, result, log)


def result_of(child: Child, seconds: float) -> Record:
    """What the case wrote, or how it failed."""
    try:
        code = child.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if child.result.is_file():
        return json.loads(child.result.read_text())
    child.log.seek(0)
    return {"error": f"exit code {code}: {child.log.read()[-800:]}"}


def compare(predicted: Record, measured: Record | None) -> Record:
    """Both, and the difference of each figure in percent of the measured one."""
    if measured is None or "error" in measured:
        return {"predicted": predicted, "measured": measured, "percent_off": None}
    found = {
        "memory_gib": measured["peak_memory_gib"],
        "step_seconds": measured["step_seconds"]["median"],
        "joules_per_1000_tokens": measured["joules_per_1000_tokens"],
    }
    off = {
        key: None if not value else 100 * (predicted[key] / value - 1)
        for key, value in found.items()
    }
    return {"predicted": predicted, "measured": measured, "percent_off": off}


def print_table(rows: dict[str, Record]) -> None:
    """One line a case."""
    print(
        f"{'case':32s} {'GiB pred':>9s} {'meas':>7s} {'%':>6s} {'s pred':>8s} {'meas':>8s}", end=""
    )
    print(f" {'%':>6s} {'J/1k pred':>9s} {'meas':>7s} {'%':>6s} {'W':>5s}")
    for name, row in rows.items():
        predicted, measured, off = row["predicted"], row["measured"], row["percent_off"]
        if off is None:
            why = "does not fit" if not predicted["fits"] else (measured or {}).get("error", "-")
            print(f"{name:32s} {predicted['memory_gib']:9.2f} {why}")
            continue
        cells = [
            f"{predicted['memory_gib']:9.2f} {measured['peak_memory_gib']:7.2f}",
            f"{off['memory_gib']:+6.1f}",
            f"{predicted['step_seconds']:8.4f} {measured['step_seconds']['median']:8.4f}",
            f"{off['step_seconds']:+6.1f}",
            f"{predicted['joules_per_1000_tokens']:9.2f}",
        ]
        if measured["joules_per_1000_tokens"] is not None:
            cells.append(f"{measured['joules_per_1000_tokens']:7.2f}")
            cells.append(f"{off['joules_per_1000_tokens']:+6.1f} {measured['watts_per_gpu']:5.0f}")
        print(f"{name:32s}", *cells)


if __name__ == "__main__":
    sys.exit(main())
