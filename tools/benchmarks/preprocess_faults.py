"""What `litespark preprocess` does with each fault on which Megatron-LM's tools hang or lose text.

    python tools/benchmarks/preprocess_faults.py --input corpus.jsonl.zst --tokenizer llama2/
    python tools/benchmarks/preprocess_faults.py --input corpus.jsonl.zst --tokenizer llama2/ \\
        --json result.json

Each fault is put into the first 400 documents of the input and met by the command that a user would
type, with two workers: a truncated line, a line without the key, a null text, an empty text, a lone
surrogate, with `--on-error stop` and with `--on-error skip`; a worker killed with SIGKILL in the
middle of the whole input; a disk (a tmpfs of 6 MB, made by root) that fills up.  Seconds count from
the start of the command, or from the kill, to its end.  A case is good if the exit code is right,
no document is gone unreported, nothing incomplete has a final name, and it took 10 s at the most.

Exit code 0 if every case is good, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from litespark.data.manifest import read_manifest  # noqa: E402
from litespark.data.readers import find_sources, iterate_blocks  # noqa: E402

DOCUMENTS = 400
LIMIT_SECONDS = 10.0
DISK_BYTES = 6_000_000
_AT = DOCUMENTS // 2  # where the fault is
# name: (the line, whether it is bad)
LINES = {
    "truncated line": ('{"text": "cut off', True),
    "line without the key": ('{"other": "a"}', True),
    "null text": ('{"text": null}', True),
    "empty text": ('{"text": ""}', False),
    "lone surrogate": ('{"text": "a \\ud808 b"}', False),
}


@dataclass(frozen=True)
class Result:
    """How one command ended; `documents` is None where no shard was to be written."""

    fault: str
    policy: str
    seconds: float
    exit_code: int
    documents: int | None
    last_words: str
    is_good: bool


def main() -> int:
    """Run every case, print a table, say whether all is well."""
    args = _parser().parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for result in _cases(args, Path(folder)):
            results.append(result)
            print(
                f"{'ok ' if result.is_good else 'BAD'} {result.fault:22} {result.policy:5} "
                f"{result.seconds:5.1f} s  exit {result.exit_code:2}  {result.last_words}",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0 if all(result.is_good for result in results) else 1


def _cases(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    whole = list(islice(_lines(args.input), DOCUMENTS))
    for name, (line, is_bad) in LINES.items():
        data = folder / "data.jsonl"
        lines = [*whole[:_AT], line.encode(), *whole[_AT:]]
        data.write_bytes(b"\n".join(lines) + b"\n")
        for policy in ("stop", "skip"):
            words = ["--input", str(data), "--on-error", policy]
            yield _line_case(args, folder, name, words, is_bad)
    yield _killed_worker(args, folder)
    yield _full_disk(args, folder)


def _lines(path: Path) -> Iterator[bytes]:
    for source in find_sources([str(path)]):
        for block in iterate_blocks(source):
            yield from block.data.splitlines()


def _line_case(
    args: argparse.Namespace, folder: Path, name: str, words: Sequence[str], is_bad: bool
) -> Result:
    policy = words[-1]
    out = folder / "out" / "p"
    started = time.perf_counter()
    process = _start(args, out, words)
    text = process.communicate(timeout=300)[0]
    seconds = time.perf_counter() - started
    ends_well = not is_bad or policy == "skip"
    expected = DOCUMENTS + (not is_bad) if ends_well else None
    documents = _documents(out)
    tells = f"{words[1]}:{_AT + 1}: " in text if is_bad else True
    is_good = (process.returncode, documents, tells) == (0 if ends_well else 2, expected, True)
    return _result(name, policy, seconds, process.returncode, out, text, is_good)


def _killed_worker(args: argparse.Namespace, folder: Path) -> Result:
    out = folder / "out" / "p"
    process = _start(args, out, ["--input", str(args.input)])
    while not any(p.stat().st_size for p in out.parent.glob("p.partial/*.bin")):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    worker = next(child for child in children if "spawn_main" in str(child.cmdline()))
    started = time.perf_counter()
    worker.send_signal(signal.SIGKILL)
    text = process.communicate(timeout=300)[0]
    seconds = time.perf_counter() - started
    is_good = process.returncode == 1 and "process died" in text
    return _result("worker killed", "", seconds, process.returncode, out, text, is_good)


def _full_disk(args: argparse.Namespace, folder: Path) -> Result:
    with _small_disk(folder / "small") as disk:
        out = disk / "p"
        started = time.perf_counter()
        process = _start(args, out, ["--input", str(args.input)])
        text = process.communicate(timeout=300)[0]
        seconds = time.perf_counter() - started
        is_good = process.returncode == 1 and "No space left on device" in text
        return _result("full disk", "", seconds, process.returncode, out, text, is_good)


@contextmanager
def _small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    subprocess.run(words, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _start(args: argparse.Namespace, out: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "litespark", "preprocess", *words]
    command += ["--tokenizer", str(args.tokenizer), "--output-prefix", str(out)]
    command += ["--workers", "2", "--overwrite", "--no-append-eod"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _documents(out: Path) -> int | None:
    manifest = read_manifest(f"{out}_text_document")
    return None if manifest is None else manifest.files.documents


def _result(
    fault: str,
    policy: str,
    seconds: float,
    exit_code: int,
    out: Path,
    text: str,
    is_good: bool,
) -> Result:
    documents = _documents(out)
    shard = sorted(path.name for path in out.parent.glob("p_text_document.*"))
    if exit_code:
        is_good = is_good and not shard
    for path in out.parent.glob("p_text_document.*"):
        path.unlink()
    words = [line for line in text.splitlines() if line.strip()]
    said = next((line for line in words if "error:" in line or "skipped" in line), words[-1])
    is_good = is_good and seconds <= LIMIT_SECONDS
    return Result(fault, policy, seconds, exit_code, documents, said, is_good)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="JSON lines, 20 MB or more")
    parser.add_argument("--tokenizer", required=True, help="a folder or a file")
    parser.add_argument("--scratch", type=Path, help="where to write (the system's)")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
