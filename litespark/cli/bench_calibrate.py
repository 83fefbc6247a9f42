"""`litespark bench --calibrate FILE`: the rates of this machine's GPU, for `litespark plan`.

Each case is a `litespark bench` in a process of its own, with few layers, so that every size of the
shapes is real and the memory is not needed.  `metering/plan/fit.py` makes the rates of the results.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litespark.errors import LitesparkError, UserError

Record = dict[str, Any]

_GIBIBYTE = 2**30
_CASE_SECONDS = 180.0
_COPY_BYTES = 2**30
_COPIES = 20
_COMMON = "--warmup 2 --steps 6 --accumulate 4"
# Those that the rates of products, memory and gaps come from, then attention at other sizes; the
# last is too small for a GPU and shows how fast the host launches.
_CASES = (
    "--model paper-3b --precision bf16 --micro-batch 2 model.num_layers=8",
    "--model paper-3b --precision fp8 --micro-batch 4 model.num_layers=8",
    "--model llama3-8b --precision bf16 --micro-batch 1 --seq-length 8192 model.num_layers=4",
    "--model paper-3b --precision bf16 --micro-batch 4 --seq-length 2048 model.num_layers=8",
    "--model llama3.2-1b --precision bf16 --micro-batch 2 model.num_layers=8",
)
_HOST_CASE = "--model llama-160m --precision bf16 --micro-batch 1 --seq-length 256"


def calibrate(target: Path) -> None:
    """Measure and write the calibration.

    Raises:
        UserError: there is no GPU, or no folder for the file.
        LitesparkError: a case failed.
    """
    import torch

    from litespark.metering.plan.fit import Subject, fit, with_host
    from litespark.utils.files import write_text_atomically

    if not target.parent.is_dir():
        raise UserError(f"--calibrate {target}", "lies in no folder that exists", "Make it first.")
    if not torch.cuda.is_available():
        raise UserError(
            "--calibrate", "measures a GPU, and there is none here", "Run it on the GPU machine."
        )
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory / _GIBIBYTE
    copied = copy_rate(_copy_seconds())
    records = [measure(case, say=sys.stdout.write) for case in _CASES]
    host = measure(f"{_HOST_CASE} --no-profile", say=sys.stdout.write)
    subject = Subject(
        gpu=target.stem,
        memory_gib=memory,
        copy_bytes_per_second=copied,
        source=f"litespark bench --calibrate on {name}, {time.strftime('%Y-%m-%d')}",
    )
    calibration = with_host(fit(records, subject), host)
    write_text_atomically(target, calibration.model_dump_json(indent=1) + "\n")
    sys.stdout.write(f"wrote {target}\n")


def measure(case: str, say: Callable[[str], Any]) -> Record:
    """The result of one `litespark bench`.

    Raises:
        LitesparkError: it failed or took too long.
    """
    say(f"{case}\n")
    with tempfile.TemporaryDirectory(prefix="litespark-calibrate-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "litespark", "bench", *_COMMON.split(), *case.split()]
        try:
            done = subprocess.run(
                [*command, "--json", str(result)],
                capture_output=True,
                text=True,
                timeout=_CASE_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise LitesparkError(f"bench {case}: not done after {_CASE_SECONDS:.0f} s") from error
        if not result.is_file():
            raise LitesparkError(f"bench {case}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def copy_rate(seconds: float) -> float:
    """Bytes a second of a copy of `_COPY_BYTES`: each is read and written."""
    return 2 * _COPY_BYTES / seconds


def _copy_seconds() -> float:
    import torch

    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_COPIES):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
