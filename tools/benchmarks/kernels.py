"""Every op of `litespark/ops` alone: how near it comes to what the GPU can do.

    python tools/benchmarks/kernels.py                       all ops, matrix products, attention
    python tools/benchmarks/kernels.py --sweep --only swiglu rms_norm

A kernel's rate is the bytes that it must move, each once, over its median time, with the L2 cache
emptied before every launch.  Its ceiling is a plain copy that moves as many bytes, timed in the
same way just before it; what a copy of 1 GiB reaches, where start and end of a launch no longer
weigh, stands beside it.  --sweep times every launch configuration in the op's CANDIDATES and names
the best.

One op that fails costs its own row only, unless it leaves the GPU in an error: then what was
measured is still printed and written.  Run the op's tests first; the rate of a wrong kernel is
worth nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The folder of this script would be searched first, and this file taken for the package `kernels`;
# the checkout in its place makes litespark importable where it is not installed.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from litespark.config.schema import ModelConfig  # noqa: E402
from litespark.metering.measurement import software  # noqa: E402
from litespark.ops.dispatch import LaunchConfig  # noqa: E402
from tools.benchmarks.kernel_cases import CASES, Case, Shapes  # noqa: E402
from tools.benchmarks.kernel_products import attention_rows, product_rows  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

_LARGE_COPY_BYTES = 2**31  # 1 GiB read, 1 GiB written
_WARM_UP_MS, _REPEAT_MS = 10, 60


def median_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call on the GPU, each with a cold L2 cache."""
    from triton.testing import do_bench

    median: Any = do_bench(call, warmup=_WARM_UP_MS, rep=_REPEAT_MS, return_mode="median")
    return float(median)


def copy_bytes_per_second(moved_bytes: int) -> float:
    """What a copy reaches that reads half of `moved_bytes` and writes the other half."""
    source = torch.empty(moved_bytes // 2, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return moved_bytes / median_ms(lambda: target.copy_(source)) * 1e3


def first_line(error: Exception) -> str:
    """An error in a table's cell."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:160]


def bandwidth_row(case: Case, ceiling: float, sweep: bool) -> Row:
    """Time and rate of one kernel with its default, and with the best of its candidates."""
    row: Row = {"op": case.kernel, "what": case.what, "bytes": case.bytes_moved}
    same_size = copy_bytes_per_second(case.bytes_moved)
    row["same_size_copy_tb_per_second"] = same_size / 1e12

    def add(prefix: str, milliseconds: float) -> None:
        rate = case.bytes_moved / milliseconds * 1e3
        row[f"{prefix}us"] = milliseconds * 1e3
        row[f"{prefix}tb_per_second"] = rate / 1e12
        row[f"{prefix}share_of_copy"] = rate / same_size
        row[f"{prefix}share_of_large_copy"] = rate / ceiling

    add("", median_ms(lambda: case.run(None)))
    if not sweep:
        return row
    row["sweep"] = []
    best: tuple[float, LaunchConfig] | None = None
    for config in case.candidates:
        tried: Row = {"config": str(config)}
        row["sweep"].append(tried)
        try:
            milliseconds = median_ms(lambda config=config: case.run(config))
        except Exception as error:  # too many registers or too much shared memory, say
            tried["error"] = first_line(error)
            torch.cuda.synchronize()  # raises where the GPU can do no more
            continue
        tried["us"] = milliseconds * 1e3
        if best is None or milliseconds < best[0]:
            best = milliseconds, config
    if best is not None:
        add("best_", best[0])
        row["best_config"] = str(best[1])
    return row


def op_rows(shapes: Shapes, names: list[str], ceiling: float, sweep: bool) -> Iterator[Row]:
    """A row a kernel; a family whose tensors cannot even be made is one row with its error."""
    for name in names:
        try:
            for case in CASES[name](shapes):
                try:
                    yield bandwidth_row(case, ceiling, sweep)
                except Exception as error:
                    yield {"op": case.kernel, "what": case.what, "error": first_line(error)}
                    torch.cuda.synchronize()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            yield {"op": name, "error": first_line(error)}
        torch.cuda.empty_cache()


def line_of(row: Row) -> str:
    """A row as text."""
    label = f"{row['op']:36} {row.get('what', ''):36}"
    if "error" in row:
        return f"{label} {row['error']}"
    if "tflops" in row:
        text = f"{label} {row['us']:9.1f} us {row['tflops']:7.0f} TFLOP/s"
        others = (f"{name} {value:.0f}" for name, value in row.get("others", {}).items())
        return "  ".join([text, *others])
    text = f"{label} {row['us']:9.1f} us {row['tb_per_second']:5.2f} TB/s"
    text += f" {row['share_of_copy']:6.1%} of copy ({row['share_of_large_copy']:.1%} of 1 GiB's)"
    if "best_config" in row:
        text += f"  best {row['best_us']:.1f} us {row['best_share_of_copy']:.1%}"
        text += f" {row['best_config']}"
    return text


def rows_of(args: argparse.Namespace, shapes: Shapes, ceiling: float) -> Iterator[Row]:
    """Everything that was asked for, in order."""
    names = [name for name in CASES if not args.only or name in args.only]
    yield from op_rows(shapes, names, ceiling, args.sweep)
    for name, rows in (("products", product_rows), ("attention", attention_rows)):
        if not args.only or name in args.only:
            yield from rows(shapes, median_ms)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="paper-3b", metavar="PRESET", help="whose shapes (default: paper-3b)")
    add("--seq-length", type=int, default=4096, help="tokens of a sample (default: 4096)")
    add("--micro-batch", type=int, default=4, help="samples at once (default: 4)")
    add("--sweep", action="store_true", help="time every launch configuration of every op")
    choices = [*CASES, "products", "attention"]
    add("--only", nargs="+", choices=choices, metavar="OP", help=f"some of {', '.join(choices)}")
    add("--json", type=Path, metavar="FILE", help="write all rows")
    return parser.parse_args()


def main() -> None:
    """Measure, print a row at a time, write the whole."""
    args = parse_arguments()
    device = torch.device("cuda", torch.cuda.current_device())
    model = ModelConfig.model_validate({"preset": args.model})
    torch.manual_seed(0)
    ceiling = copy_bytes_per_second(_LARGE_COPY_BYTES)
    result: Row = {
        "model": args.model,
        "sequence_length": args.seq_length,
        "micro_batch": args.micro_batch,
        "device": torch.cuda.get_device_name(),
        "large_copy_tb_per_second": ceiling / 1e12,
        **software(ROOT),
        "rows": [],
    }
    print(f"{result['device']}: copy of 1 GiB {ceiling / 1e12:.2f} TB/s", flush=True)
    try:
        for row in rows_of(args, Shapes(model, args.seq_length, args.micro_batch, device), ceiling):
            result["rows"].append(row)
            print(line_of(row), flush=True)
    finally:
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
