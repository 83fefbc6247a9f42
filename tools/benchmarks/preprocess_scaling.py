"""How `litespark preprocess` grows with its workers, and how long it takes to start.

    python tools/benchmarks/preprocess_scaling.py --input corpus.jsonl.zst --tokenizer llama2/ \\
        --workers 1 2 4 8 16 32 64 --json result.json

The text is given `--copies` times for each worker, at most `--most-copies` times in all, as so many
files, so that each run takes some seconds; the words of the copies are the same, so a worker meets
few new ones after its first copy.  Wall time and CPU-seconds are those of the whole command, from
the start of its process to its end, and MB count the text.  The start-up is the wall time of the
whole command for one document with two workers, the best of three.  One more process, which is not
counted among the workers, reads, decompresses, hashes and writes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_STARTS = 3


def run_once(
    inputs: Sequence[Path], tokenizer: str, folder: Path, workers: int
) -> dict[str, float | int]:
    """Preprocess the inputs into `folder` and remove what was written; return the figures.

    Raises:
        SystemExit: when the command fails.
    """
    prefix = folder / "shard"
    command = [sys.executable, "-m", "litespark", "preprocess", "--output-prefix", str(prefix)]
    command += ["--tokenizer", tokenizer, "--workers", str(workers), "--overwrite"]
    command += ["--input", *map(str, inputs)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall_seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:9])} ... failed:\n{done.stderr[-4000:]}")
    after = os.times()
    cpu_seconds = after.children_user - before.children_user
    cpu_seconds += after.children_system - before.children_system
    manifest = json.loads(Path(f"{prefix}_text_document.json").read_text())
    for path in folder.glob("shard*"):
        path.unlink()
    return {
        "workers": workers,
        "files": len(inputs),
        "wall_seconds": round(wall_seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "tokens": int(manifest["files"]["tokens"]),
    }


def text_of(path: Path) -> tuple[int, str]:
    """Return the bytes of all texts of a `.jsonl.zst` in UTF-8, and its first short line."""
    import orjson
    import zstandard

    total, first = 0, ""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        rest = b""
        while block := stream.read(1 << 22):
            *lines, rest = (rest + block).split(b"\n")
            for line in filter(None, lines):
                total += len(orjson.loads(line)["text"].encode())
                if not first and len(line) < 10_000:
                    first = line.decode()
    return total, first


def start_seconds(line: str, tokenizer: str, folder: Path) -> float:
    """Return the best wall time of a job of one document with two workers."""
    small = folder / "small.jsonl"
    small.write_text(line + "\n")
    runs = [run_once([small], tokenizer, folder, 2) for _ in range(_STARTS)]
    return float(min(run["wall_seconds"] for run in runs))


def main() -> None:
    """Measure the start-up of each tokenizer and the first one's growth; print and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help=".jsonl.zst with a key `text`")
    parser.add_argument("--tokenizer", required=True, nargs="+", help="folders of tokenizers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--copies", type=int, default=1, metavar="N")
    parser.add_argument("--most-copies", type=int, default=32, metavar="N")
    parser.add_argument("--most-seconds", type=float, default=80.0, help="begin no run after that")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--json", metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        text_bytes, line = text_of(Path(args.input))
        starts = {
            Path(name).name: start_seconds(line, name, folder)
            for name in dict.fromkeys(args.tokenizer)
        }
        print(f"start-up in seconds: {starts}")
        runs: list[dict[str, Any]] = []
        for workers in args.workers:
            if time.perf_counter() - began > args.most_seconds:
                print(f"{workers} workers: not run, {args.most_seconds:g} s are over")
                continue
            inputs = []
            for number in range(min(workers * args.copies, args.most_copies)):
                inputs.append(folder / f"copy{number}.jsonl.zst")
                if not inputs[-1].exists():
                    inputs[-1].symlink_to(Path(args.input).resolve())
            run: dict[str, Any] = run_once(inputs, args.tokenizer[0], folder, workers)
            mb = text_bytes * len(inputs) / 1e6
            run["mb_per_second"] = round(mb / run["wall_seconds"], 1)
            run["mb_per_cpu_second"] = round(mb / run["cpu_seconds"], 1)
            run["tokens_per_second"] = round(run["tokens"] / run["wall_seconds"])
            runs.append(run)
            growth = run["mb_per_second"] / runs[0]["mb_per_second"]
            print(
                f"{workers:3} workers: {mb:7.1f} MB in {run['wall_seconds']:6.2f} s, "
                f"{run['mb_per_second']:7.1f} MB/s ({growth:.1f} x), "
                f"{run['tokens_per_second'] / 1e6:6.2f} M tokens/s, "
                f"{run['mb_per_cpu_second']:.1f} MB a CPU-second",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        result = {
            "text_bytes": text_bytes,
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "start_seconds": starts,
            "runs": runs,
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
