"""How fast text becomes an indexed shard: `litespark preprocess` beside Megatron-LM's tools.

    python tools/benchmarks/preprocess.py --input corpus.jsonl.zst --tokenizer llama2/
    python tools/benchmarks/preprocess.py --input corpus.jsonl.zst --tokenizer llama2/ \\
        --megatron ../Megatron-LM --megatron-python ../venv312/bin/python --json result.json
    python tools/benchmarks/preprocess.py --input corpus.jsonl.zst --tokenizer llama2/ \\
        --megatron ../Megatron-LM --workers 32 --copies 4 --no-memory

Every tool is started as a user would start it, on the same text, one after another, `--rounds`
times in turn; each round's figures are kept and the best wall time is compared.  Wall time counts
from the start of the process to its end, so imports are in it; what earlier runs wrote is put on
the disk first.  CPU-seconds are those of the process and all its children.  Peak memory is taken in
one more run, which is not timed, for looking costs time: the largest sum, over all processes of the
tool, of PSS (what a process holds, shared pages divided among their holders), sampled every 50 ms;
the sum of RSS, which counts shared pages once a process, stands beside it.  `--no-memory` leaves
that run out.

Many cores end small inputs too soon to be measured: `--copies` gives every tool the same text so
often, one after the other in one file.  All tools remember words, so all gain by the repetition.

Megatron-LM's tools read plain `.jsonl`, so they get the decompressed file, and decompressing it is
not counted.  `preprocess_data_fast.py` needs Python 3.12 or newer and gigatoken.  The classic tool
is run with both tokenizers where the folder has both files.  Outputs are compared byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One tool's figures for one round."""

    name: str
    wall_seconds: float
    cpu_seconds: float
    peak_pss_mb: float
    peak_rss_mb: float
    bin_sha256: str
    idx_sha256: str


def measure(
    name: str, command: Sequence[str], prefix: Path, cwd: Path, *, watch_memory: bool
) -> Run:
    """Run a command that writes `<prefix>_text_document.bin` and `.idx`.

    Raises:
        SystemExit: when it fails.
    """
    paths = [str(cwd), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.sync()  # ours ends with its files on the disk, and must not wait there for another's
    started, before = time.perf_counter(), os.times()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
        pss_mb, rss_mb = _watch(process) if watch_memory else (0.0, 0.0)
        process.wait()
        wall_seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{name} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    after = os.times()
    cpu_seconds = after.children_user - before.children_user
    cpu_seconds += after.children_system - before.children_system
    digests = [_sha256(Path(f"{prefix}_text_document{suffix}")) for suffix in (".bin", ".idx")]
    return Run(name, round(wall_seconds, 2), round(cpu_seconds, 2), pss_mb, rss_mb, *digests)


def _watch(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Wait for a process; return the peaks of its tree's PSS and RSS in MB."""
    tree = psutil.Process(process.pid)
    peak_pss = peak_rss = 0
    while process.poll() is None:
        pss = rss = 0
        try:
            for one in (tree, *tree.children(recursive=True)):
                memory = one.memory_full_info()
                rss += memory.rss
                pss += getattr(memory, "pss", memory.rss)
        except psutil.NoSuchProcess:
            pass  # one ended between being listed and being asked: this sample is too small
        peak_pss, peak_rss = max(peak_pss, pss), max(peak_rss, rss)
        time.sleep(_SAMPLE_SECONDS)
    return round(peak_pss / 1e6, 1), round(peak_rss / 1e6, 1)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()[:16]


def our_command(args: argparse.Namespace, tokenizer: str, prefix: Path) -> list[str]:
    """Return the command line of `litespark preprocess`."""
    command = [sys.executable, "-m", "litespark", "preprocess", "--input", args.input]
    command += ["--tokenizer", tokenizer, "--output-prefix", str(prefix), "--overwrite"]
    return [*command, "--workers", str(args.workers)]


def megatron_commands(
    args: argparse.Namespace, plain: Path, folder: Path
) -> list[tuple[str, list[str], Path]]:
    """Return (name, command, prefix) of each of Megatron-LM's tools that can run here."""
    tokenizer = Path(args.tokenizer).resolve()
    common = ["--input", str(plain), "--append-eod"]
    classic = [args.megatron_python, "tools/preprocess_data.py", "--workers", str(args.workers)]
    fast = [args.megatron_python, "tools/preprocess_data_fast.py", "--use-gigatoken"]
    runs: list[tuple[str, list[str], Path]] = []
    if (tokenizer / "tokenizer.json").is_file():
        hf = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
        runs += [
            (name, [*tool, *common, *hf, "--output-prefix", str(folder / name)], folder / name)
            for name, tool in (("megatron-hf", classic), ("megatron-fast", fast))
        ]
    model = tokenizer / "tokenizer.model"
    if model.is_file():
        name = "megatron-sentencepiece"
        kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
        command = [*classic, *common, *kind, "--output-prefix", str(folder / name)]
        runs.append((name, command, folder / name))
    return runs


def repeated(path: str, copies: int, folder: Path) -> str:
    """Return the input `copies` times in one file of its kind, made in `folder` if more than 1."""
    if copies == 1:
        return path
    # Frames of zstd one after the other are a zstd file; a corpus ends with a line end.
    target_path = folder / f"copies-{Path(path).name}"
    with open(target_path, "wb") as target:
        for _ in range(copies):
            with open(path, "rb") as source:
                shutil.copyfileobj(source, target)
    return str(target_path)


def decompressed(path: str, folder: Path) -> Path:
    """Return the text's plain `.jsonl`, made in `folder` when the input is compressed."""
    import zstandard

    if not path.endswith(".zst"):
        return Path(path).resolve()
    plain = folder / "plain.jsonl"
    decompressor = zstandard.ZstdDecompressor()
    with (
        open(path, "rb") as source,
        decompressor.stream_reader(source, read_across_frames=True) as stream,
        open(plain, "wb") as target,
    ):
        shutil.copyfileobj(stream, target, 1 << 22)
    return plain


def rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Return one row a tool: its best round, and how many times as long it took as ours."""
    names = list(dict.fromkeys(run.name for run in runs))
    best: dict[str, Run] = {}
    for name in names:
        of_tool = [run for run in runs if run.name == name]
        watched = [run for run in of_tool if run.peak_rss_mb]
        best[name] = min((r for r in of_tool if r not in watched), key=lambda r: r.wall_seconds)
        for run in watched:
            memory = {"peak_pss_mb": run.peak_pss_mb, "peak_rss_mb": run.peak_rss_mb}
            best[name] = replace(best[name], **memory)
    ours = best["litespark"]
    return [
        asdict(run)
        | {
            "wall_of_ours": round(run.wall_seconds / ours.wall_seconds, 2),
            "cpu_of_ours": round(run.cpu_seconds / ours.cpu_seconds, 2),
        }
        for run in best.values()
    ]


def print_table(table: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    print(f"{'tool':24} {'wall s':>7} {'CPU s':>7} {'PSS MB':>7} {'RSS MB':>7} {'x wall':>7} x CPU")
    for row in table:
        print(
            f"{row['name']:24} {row['wall_seconds']:7} {row['cpu_seconds']:7} "
            f"{row['peak_pss_mb']:7} {row['peak_rss_mb']:7} {row['wall_of_ours']:7} "
            f"{row['cpu_of_ours']}  {row['bin_sha256']} {row['idx_sha256']}"
        )


def main() -> None:
    """Run all tools in turn, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help=".jsonl or .jsonl.zst with a key `text`")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
    parser.add_argument("--workers", type=int, default=psutil.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1, metavar="N", help="of the text")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--megatron", metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    text = Path(args.input).resolve()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.input = repeated(str(text), args.copies, folder)
        plain = decompressed(args.input, folder) if args.megatron else folder
        tokenizer = str(Path(args.tokenizer).resolve())
        for watch in [False] * args.rounds + [True] * (not args.no_memory):
            command = our_command(args, tokenizer, folder / "ours")
            runs.append(measure("litespark", command, folder / "ours", ROOT, watch_memory=watch))
            for tool, command, prefix in megatron_commands(args, plain, folder):
                if args.megatron:
                    checkout = Path(args.megatron).resolve()
                    runs.append(measure(tool, command, prefix, checkout, watch_memory=watch))
    table = rows(runs)
    print_table(table)
    if args.json:
        result = {
            "input": {"name": text.name, "bytes": text.stat().st_size, "copies": args.copies},
            "workers": args.workers,
            "machine": {"processor": platform.processor(), "cores": len(os.sched_getaffinity(0))},
            "python": platform.python_version(),
            "gigatoken": version("gigatoken"),
            "best": table,
            "rounds": [asdict(run) for run in runs],
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
