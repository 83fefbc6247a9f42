"""What a checkpoint costs a run on one device: the stall, the slower steps, save and load in GB/s.

Random tokens, the set-up, step and saving of `litespark train`.  Steps are timed alone, then with
a save in the background, twice: for the first, host memory is taken while the steps before it run.
Then the last checkpoint is compared with its checksums and loaded, from a page cache that has
forgotten it.  The disk's own speed is measured in the same run: `dd` with fsync, and with O_DIRECT
to read, one stream and as many side by side as a save has files.

    python tools/benchmarks/checkpoint.py --model paper-3b --precision bf16 --json result.json

`stall_beyond_copy` is what the step loop waited in the call that saves, less the transfer to host
memory itself, as a share of one step.  What does not fit into `--budget-seconds` is left out, and
said.  Needs room in `--folder` for one checkpoint (14 bytes a parameter) and 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litespark.cli.bench import build_config
from litespark.config.validate import check_config
from litespark.parallel.device import prepare_megatron

prepare_megatron()  # before anything imports megatron-core

import litespark  # noqa: E402
from litespark.checkpoint.host_copy import FILES_PER_RANK  # noqa: E402
from litespark.checkpoint.integrity import share_faults  # noqa: E402
from litespark.checkpoint.load import load_checkpoint  # noqa: E402
from litespark.metering.measurement import software  # noqa: E402
from litespark.parallel.groups import stop_process_group  # noqa: E402
from litespark.training.benchmark import RandomBatches  # noqa: E402
from litespark.training.hooks.checkpointing import Checkpointing  # noqa: E402
from litespark.training.setup import build_run, start_processes  # noqa: E402
from litespark.training.state import TrainingRun  # noqa: E402
from litespark.training.step import mean_loss, train_step  # noqa: E402

Record = dict[str, Any]
STEPS_AFTER = 3


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a summary, write the JSON."""
    args = _parser().parse_args(arguments)
    deadline = time.monotonic() + args.budget_seconds
    with tempfile.TemporaryDirectory(prefix="litespark-checkpoint-", dir=args.folder) as folder:
        args.overrides += [f"run.output_dir={folder}/run", "checkpoint.verify=true"]
        config = build_config(args, 1)
        check_config(config, 1)
        run = build_run(config, start_processes(config))
        run.folder.mkdir()
        run.train_batches = RandomBatches(run)  # type: ignore[assignment] - all a step asks for
        try:
            Measurement(run, args, Path(folder), deadline).make()
        finally:
            stop_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="paper-3b", metavar="PRESET", help="shape (default: paper-3b)")
    add("--precision", default="bf16", choices=["bf16", "fp8", "fp32"])
    add("--recipe", help="fp8 scaling: delayed, tensorwise or blockwise")
    add("--backend", help="auto, reference, triton or te")
    add("--seq-length", type=int, help="tokens of a sample (default: 4096, or the longest)")
    add("--micro-batch", type=int, default=2, help="samples at once (default: 2)")
    add("--accumulate", type=int, default=8, help="micro-batches of a step (default: 8)")
    add("--warmup", type=int, default=3, help="steps before (default: 3)")
    add("--steps", type=int, default=5, help="timed steps before the first save (default: 5)")
    add("--disk-gigabytes", type=float, default=2.0, help="that each dd writes (default: 2)")
    add("--saves", type=int, default=2, choices=[1, 2], help="1 leaves time to load (default: 2)")
    add("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    add("--budget-seconds", type=float, default=140.0, help="of the whole (default: 140)")
    add("--json", type=Path, metavar="FILE", help="write all figures, after each part")
    add("overrides", nargs="*", metavar="section.key=value", help="e.g. model.num_layers=8")
    parser.set_defaults(data=None)
    return parser


class Measurement:
    """One run under measurement; `result` grows part by part and is written after each."""

    def __init__(
        self, run: TrainingRun, args: argparse.Namespace, folder: Path, deadline: float
    ) -> None:
        self.run, self.args, self.folder, self.deadline = run, args, folder, deadline
        self.hook = Checkpointing()
        self.result: Record = {
            "model": run.config.model.preset,
            "precision": run.config.precision.mode,
            "tokens_per_step": run.config.tokens_per_step,
            "device": run.process.device.name,
            "cpu_cores": len(os.sched_getaffinity(0)),
            "file_system": _file_system(folder),
            **software(Path(litespark.__file__).parents[1]),
        }

    def make(self) -> None:
        """All parts, in an order in which the dearest come last."""
        for _ in range(self.args.warmup):
            self._step()
        self.before = self._steps(self.args.steps)
        self._add("steps_before", _spread(self.before))
        self._add("disk", disk_speed(self.folder, self.args.disk_gigabytes))
        self._add("first_save", self._save())
        seconds = self.result["first_save"]["background_seconds"]
        if self.args.saves > 1:
            self._in_budget("second_save", 1.2 * seconds + 10, self._save)
        self._in_budget("load", 2 * seconds, self._load)

    def _in_budget(self, name: str, needed_seconds: float, part: Callable[[], Record]) -> None:
        left = self.deadline - time.monotonic()
        if needed_seconds > left:
            self._add(name, {"left_out": f"would take {needed_seconds:.0f} s of {left:.0f} left"})
            return
        self._add(name, part())

    def _add(self, name: str, figures: Record) -> None:
        self.result[name] = figures
        print(f"{name}: {json.dumps(figures)}", flush=True)
        if self.args.json is not None:
            self.args.json.write_text(json.dumps(self.result, indent=1) + "\n")

    def _step(self) -> float:
        """One step; its loss."""
        outcome = train_step(self.run)
        self.hook.after_step(self.run, outcome)  # which gets ready for saves, and saves none
        self.run.process.device.synchronize()
        return mean_loss(outcome.loss_and_tokens)

    def _steps(self, count: int) -> list[float]:
        """Seconds of some steps."""
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - started)
        return seconds

    def _save(self) -> Record:
        """Save, train on until that is on disk, and a few steps more."""
        # There may be room for one checkpoint only.
        shutil.rmtree(self.run.folder / "checkpoints", ignore_errors=True)
        os.sync()
        self._step()  # a later step than the last save's
        started = time.perf_counter()
        self.hook.save(self.run)
        called = time.perf_counter() - started
        saver = self.hook.saver
        assert saver is not None, "it has just saved"
        during = []
        self.loss_after_save = None
        while self.loss_after_save is None or saver.wait(0) is None:
            began = time.perf_counter()
            loss = self._step()
            self.loss_after_save = self.loss_after_save or loss
            during.append(time.perf_counter() - began)
        outcome = saver.wait()
        assert outcome is not None, "it was waited for"
        if outcome.checkpoint is None:
            raise SystemExit(f"the save failed: {outcome.problem}")
        self.checkpoint = outcome.checkpoint
        step, copying = statistics.median(self.before), outcome.copying
        beyond = called - copying.transfer
        # The last step may have gone on without the save.
        slower = sum(during[:-1]) / (step * len(during[:-1])) - 1 if during[1:] else None
        return {
            "gigabytes": outcome.num_bytes / 1e9,
            "call_seconds": called,
            "plan_seconds": copying.plan,
            "memory_seconds": copying.memory,
            "copy_seconds": copying.transfer,
            "copy_gb_per_second": outcome.num_bytes / 1e9 / copying.transfer,
            "stall_beyond_copy_seconds": beyond,
            "stall_beyond_copy": beyond / step,
            "stall_beyond_copy_and_memory": (beyond - copying.memory) / step,
            "background_seconds": outcome.seconds,
            "save_gb_per_second": outcome.num_bytes / 1e9 / outcome.seconds,
            "steps_during": _spread(during),
            "steps_during_slower_by": slower,
            "steps_after": _spread(self._steps(STEPS_AFTER)),
        }

    def _load(self) -> Record:
        """Compare the last checkpoint with its checksums and load it; the next loss is the same."""
        files = [path for path in self.checkpoint.rglob("*") if path.is_file()]
        gigabytes = sum(path.stat().st_size for path in files) / 1e9
        for path in files:
            forget(path)
        started = time.perf_counter()
        faults = share_faults(self.checkpoint)
        verified = time.perf_counter() - started
        if faults:
            raise SystemExit(f"damaged: {faults}")
        started = time.perf_counter()
        state = load_checkpoint(self.checkpoint, self.run.chunks, self.run.optimizer)
        self.run.step = state.step
        self.run.policy.load_state(state.fp8_scales)
        self.run.policy.weights_changed()
        self.run.process.device.synchronize()
        loaded = time.perf_counter() - started
        return {
            "gigabytes": gigabytes,
            "verify_seconds": verified,
            "verify_gb_per_second": gigabytes / verified,
            "load_from_page_cache_seconds": loaded,
            "load_from_page_cache_gb_per_second": gigabytes / loaded,
            "verify_and_load_gb_per_second": gigabytes / (verified + loaded),
            "loss_of_next_step_after_save": self.loss_after_save,
            "loss_of_next_step_after_load": self._step(),
        }


def disk_speed(folder: Path, gigabytes: float) -> Record:
    """GB/s of `dd` with fsync, and of reading past the page cache, for one and more streams."""
    blocks = max(1, round(gigabytes * 1e9 / (16 << 20)))
    source = folder / "random"
    with open(source, "wb") as file:
        for _ in range(blocks):
            file.write(os.urandom(1 << 20) * 16)  # no disk is measured with zeros
    found: Record = {"gigabytes_a_stream": source.stat().st_size / 1e9}
    for streams in (1, FILES_PER_RANK):
        targets = [folder / f"dd_{number}" for number in range(streams)]
        total = streams * found["gigabytes_a_stream"]
        write = [["dd", f"if={source}", f"of={path}", "bs=16M", "conv=fsync"] for path in targets]
        found[f"write_gb_per_second_{streams}"] = total / _seconds(write)
        for path in targets:
            forget(path)
        read = [["dd", f"if={path}", "of=/dev/null", "bs=16M"] for path in targets]
        direct = _seconds([[*command, "iflag=direct"] for command in read])
        seconds = direct or _seconds(read)
        found[f"read_gb_per_second_{streams}"] = total / seconds
        found["read_past_the_page_cache"] = direct is not None
        for path in targets:
            path.unlink()
    source.unlink()
    return found


def _seconds(commands: list[list[str]]) -> Any:
    """How long some commands side by side take; None if one of them fails."""
    started = time.perf_counter()
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in running]
    return None if any(codes) else time.perf_counter() - started


def forget(path: Path) -> None:
    """Drop a file, which is on disk, from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _file_system(folder: Path) -> str:
    """Type and device of the file system of a folder."""
    place = str(folder.resolve())
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    around = [m for m in mounts if place == m[1] or place.startswith(m[1].rstrip("/") + "/")]
    device, _, kind = max(around, key=lambda mount: len(mount[1]))
    return f"{kind} on {device}"


def _spread(seconds: list[float]) -> Record:
    if not seconds:
        return {"n": 0}
    return {
        "n": len(seconds),
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
