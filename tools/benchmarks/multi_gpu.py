"""Litespark on the GPUs of one host: speed of every layout, losses against one GPU, faults.

    python tools/benchmarks/multi_gpu.py --smoke --seconds 150 --json smoke.json
    python tools/benchmarks/multi_gpu.py --seconds 480 --json full.json --peer-pythonpath DIR
    python tools/benchmarks/multi_gpu.py --device cpu --gpus 2 --json cpu.json

Runs what fits into the time, the most telling first (`multi_gpu_cases.py`); a case that fails or
hangs is recorded with its last words, and the others go on.  Every result is in the file at once.
Exit code 0 if everything that ran succeeded and every loss is within its bound, else 1.

Bounds of the losses, relative, over the steps of one comparison.  Layouts differ in the order of
sums, and in what is rounded before it is summed (a rank's partial sum of a product).

fp32: a sum of n terms in another order differs by sqrt(n) 2^-24; Adam divides gradients by their
own size, so that a rounding error of a tiny gradient becomes a visible part of the learning rate.
1e-5, as in `tests/distributed/test_layouts.py`; a forgotten reduction shows as 1e-3.

bf16: an element of the residual stream is rounded at 2^-9 of itself, at random, about 2 times a
layer more or less; over 8 layers 4 * 2^-9 = 0.8 %, which a logit of size 1 carries to a token's
loss with a random sign: over 8192 tokens 0.8 % / 90 = 1e-4, of a loss of 10, and weights that have
drifted apart for 20 steps a few times as much.  2^-9 = 2e-3 leaves room for that.

fp8: ranks scale their parts of a weight on their own, so that its E4M3 roundings, 2^-4 / sqrt(12) =
2 % of an element, are drawn anew: 32 products of 768 terms, 2 % sqrt(32 / 768) = 0.4 % of a
logit, half of what BF16 adds, and as random.  2^-8 for both together.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# The folder of this script would be searched first, and its kernels.py taken for the package
# `kernels`.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.benchmarks import multi_gpu_cases as matrix  # noqa: E402
from tools.benchmarks.multi_gpu_lanes import Place, Record, Report, run_lane  # noqa: E402

BOUNDS = {"fp32": 1e-5, "bf16": 2**-9, "fp8": 2**-8}
_GIBIBYTE = 2**30


def main() -> int:
    """Run the matrix, print a summary, say whether all is well."""
    args = _parser().parse_args()
    started = time.monotonic()
    gpus, memory_gib, name = _gpus() if args.device == "cuda" else (2, 0.0, "CPU")
    gpus = args.gpus or gpus
    head = {"command": sys.argv[1:], "device": name, "gpus": gpus, "memory_gib": memory_gib}
    report = Report(args.json, head | {"bounds": BOUNDS, "began": time.time()})
    phases = _phases(args, gpus, memory_gib)
    if args.only:
        phases = _only(phases, args.only)
    logs = args.logs or Path(tempfile.mkdtemp(prefix="litespark-multi-gpu-"))
    logs.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="litespark-scratch-", dir=args.scratch))
    place = Place(args.device, logs, scratch, args.peer_pythonpath)
    try:
        for phase in phases:
            deadline = started + min(args.seconds, args.seconds * phase.share)
            threads = [
                threading.Thread(target=run_lane, args=(lane, place, report, deadline))
                for lane in phase.lanes
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.head["seconds"] = time.monotonic() - started
    report.write()
    print(summary(report), flush=True)
    return 0 if all_well(report) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, required=True, help="file of the results")
    add("--seconds", type=float, default=480.0, help="time for all of it (default: 480)")
    add("--smoke", action="store_true", help="every path once, at small shapes")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: gloo, the smallest model")
    add("--gpus", type=int, help="use so many (default: all there are; on a CPU 2 processes)")
    add("--only", metavar="TEXT", help="only cases with this in their names, and what they need")
    add("--logs", type=Path, help="folder of the ranks' logs (default: a new one under /tmp)")
    add("--scratch", type=Path, help="folder for checkpoints (default: the system's)")
    add(
        "--peer-pythonpath",
        metavar="DIR[:DIR]",
        help="packages for Megatron-Core with Transformer Engine, found before the installed ones; "
        "'' with the installed ones; without this option the peer is not run",
    )
    return parser


def _gpus() -> tuple[int, float, str]:
    import torch

    count = torch.cuda.device_count()
    if not count:
        sys.exit("no GPU here; --device cpu tests this script without one")
    properties = torch.cuda.get_device_properties(0)
    return count, properties.total_memory / _GIBIBYTE, properties.name


def _phases(args: argparse.Namespace, gpus: int, memory_gib: float) -> list[matrix.Phase]:
    if args.device == "cpu":
        return matrix.on_cpu(gpus)
    has_peer = args.peer_pythonpath is not None
    if args.smoke:
        return matrix.smoke(gpus, has_peer=has_peer)
    return matrix.full(gpus, memory_gib, has_peer=has_peer)


def _only(phases: list[matrix.Phase], text: str) -> list[matrix.Phase]:
    cases = [case for phase in phases for lane in phase.lanes for case in lane.cases]
    wanted = [case for case in cases if text in case.name]
    names = {case.name for case in wanted} | {case.compared_with for case in wanted}
    kept = []
    for phase in phases:
        lanes = [
            matrix.Lane(lane.first, tuple(case for case in lane.cases if case.name in names))
            for lane in phase.lanes
        ]
        kept.append(matrix.Phase(tuple(lane for lane in lanes if lane.cases)))
    return kept


def all_well(report: Report) -> bool:
    """Whether everything that was run succeeded, within its bound."""
    for record in report.records:
        if "problem" in record and not record["problem"].startswith("not run"):
            return False
        if record["kind"] == "losses" and not _deviation(record, report)[1]:
            return False
    return True


def _deviation(record: Record, report: Report) -> tuple[float | None, bool]:
    """The largest relative difference from the losses on one GPU, and whether that will do."""
    reference = report.find(record["compared_with"])
    own = record.get("result")
    if reference is None or own is None:
        return None, True  # said elsewhere
    pairs = zip(own["losses"], reference["losses"], strict=True)
    largest = max(abs(loss - wanted) / abs(wanted) for loss, wanted in pairs)
    precision = record["name"].split()[2]
    learned = own["losses"][-1] < own["losses"][0]
    # Written so that a loss that is no number does not pass.
    return largest, largest <= BOUNDS[precision] and learned


def summary(report: Report) -> str:
    """All results as a table for people."""
    lines = [
        f"{'case':38s} {'tokens/s/GPU':>12s} {'of 1 GPU':>8s} {'J/1000':>7s} {'GiB':>6s}  loss"
    ]
    for record in report.records:
        result = record.get("result")
        if record["kind"] in ("bench", "peer") and result:
            lines.append(_speed_line(record, result, report))
    for record in report.records:
        result = record.get("result")
        if record["kind"] == "losses" and result:
            deviation, is_good = _deviation(record, report)
            text = "no reference" if deviation is None else f"{deviation:.1e}"
            verdict = "" if is_good else "   BEYOND THE BOUND"
            losses = f"{result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
            lines.append(f"{record['name']:38s} {losses}, off by {text}{verdict}")
        elif record["kind"] == "checkpoint" and result:
            for number, save in enumerate(result["saves"], start=1):
                lines.append(f"{record['name']:38s} save {number}: {_save_words(save)}")
        elif record["kind"] == "kill" and result:
            times = {key: value for key, value in result.items() if key.endswith("_seconds")}
            words = ", ".join(f"{key[:-8]} {value:.1f} s" for key, value in times.items())
            lines.append(f"{record['name']:38s} {words}")
    problems = [record for record in report.records if "problem" in record]
    for record in problems:
        lines.append(f"{record['name']:38s} {record['problem']}")
    for record in problems:
        if "log" in record:
            lines.append(f"===== {record['name']}\n{record['log']}")
    return "\n".join(lines)


def _speed_line(record: Record, result: Record, report: Report) -> str:
    speed = result["tokens_per_second"] / result["gpus"]
    reference = report.find(record["compared_with"])
    ratio = "-"
    # Another length is other work a token.
    if reference is not None and reference["sequence_length"] == result["sequence_length"]:
        ratio = f"{speed / reference['tokens_per_second']:.3f}"
    joules, loss = result["joules_per_1000_tokens"], result["loss"]
    return (
        f"{record['name']:38s} {speed:12,.0f} {ratio:>8s} "
        f"{'-' if joules is None else f'{joules:.2f}':>7s} {result['peak_memory_gib']:6.1f}  "
        f"{'not finite' if loss is None else f'{loss:.4f}'}"
    )


def _save_words(save: dict[str, Any]) -> str:
    if save["problem"]:
        return save["problem"]
    return (
        f"training waited {save['stall_seconds']:.2f} s; {save['bytes'] / 1e9:.2f} GB in "
        f"{save['background_seconds']:.1f} s, {save['gigabytes_per_second']:.2f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
