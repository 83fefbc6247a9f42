"""Measures, and writes each measurement to every place that wants it.

`metrics.jsonl` is the record that reports are made from; TensorBoard, Weights & Biases and the
console show the same numbers.  A value that cannot be measured here is null, never a guess.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from litespark.metering.energy import EnergyMeter
from litespark.metering.flops import flops_per_token, mfu, tflops
from litespark.metering.gpu_peaks import check_below_peak, peak_for_device
from litespark.metering.memory import peak_memory_bytes
from litespark.training.hooks.console import Console
from litespark.training.hooks.sinks import TensorBoardSink, WandbSink
from litespark.training.loop import Hook
from litespark.training.state import Timings, TrainingRun
from litespark.training.step import StepOutcome, attended_tokens, mean_values
from litespark.utils.files import write_text_atomically

Record = dict[str, Any]


class MetricsWriter:
    """Hands records to metrics.jsonl and the other sinks; on other ranks than the first, to none.

    Lines of steps after the one the run resumes from are dropped: they are written again.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.is_first = run.process.is_first
        self.file: TextIO | None = None
        self.tensorboard: TensorBoardSink | None = None
        self.wandb: WandbSink | None = None
        if not self.is_first:
            return
        self.console = Console(run)
        if run.config.logging.wandb_project is not None:
            self.wandb = WandbSink(run.config.logging.wandb_project, run.config, run.folder)

    def begin(self, run: TrainingRun) -> None:
        """Open the files, behind the run's step; what they say of later steps is dropped."""
        if not self.is_first:
            return
        self._close_files()
        path = run.folder / "metrics.jsonl"
        drop_lines_after(path, run.step)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        if run.config.logging.tensorboard:
            self.tensorboard = TensorBoardSink(run.folder / "tensorboard", purge_step=run.step + 1)

    def write_step(self, record: Record) -> None:
        """Write the measurements of a logged step."""
        self._write(record)
        if self.is_first:
            self.console.show_step(record)

    def write_validation(self, run: TrainingRun, loss: float, metrics: Record) -> None:
        """Write the result of an evaluation; `metrics` are the objective's."""
        record = {"step": run.step, "tokens": _tokens(run), "validation_loss": loss}
        record.update({f"validation_{name}": value for name, value in metrics.items()})
        self._write(record)
        if self.is_first:
            self.console.show_validation(record)

    def close(self) -> None:
        """Flush and close all sinks."""
        if self.is_first:
            self.console.close()
            self._close_files()
            if self.wandb is not None:
                self.wandb.close()

    def _close_files(self) -> None:
        for file in (self.file, self.tensorboard):
            if file is not None:
                file.close()
        self.file = self.tensorboard = None

    def _write(self, record: Record) -> None:
        if self.file is None:
            return
        # NaN and Infinity are no JSON; a value that is not finite was not measured.
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        for sink in (self.tensorboard, self.wandb):
            if sink is not None:
                sink.write(finite)


class StepMetrics(Hook):
    """Every `training.log_every` steps: this step's loss; speed, energy and memory since the last.

    The loss is the step's own, not a mean since the last line: it is then the same whether or not
    the run was stopped and resumed in between.
    """

    def __init__(self, writer: MetricsWriter) -> None:
        self.writer = writer
        self.energy = EnergyMeter()

    def on_start(self, run: TrainingRun) -> None:
        """Learn what the rates are held against."""
        model, length = run.config.model, run.config.data.sequence_length
        self.flops_full = flops_per_token(model, length, causal=False)
        self.peak = peak_for_device(run.process.device.name)

    def on_state(self, run: TrainingRun) -> None:
        """Start the counters."""
        self.writer.begin(run)
        self.logged_step = run.step
        self.joules = self.energy.read_joules()
        self.read_at_seconds = time.perf_counter()
        run.timings = Timings()

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Write a line when it is time."""
        if run.step % run.config.training.log_every and run.step != run.total_steps:
            return
        self.writer.write_step(self._record(run, outcome))
        self.logged_step = run.step
        run.timings = Timings()

    def close(self) -> None:
        """Close the writer."""
        self.writer.close()

    def _record(self, run: TrainingRun, outcome: StepOutcome) -> Record:
        steps = run.step - self.logged_step
        step_seconds = run.timings.steps_seconds / steps
        tokens_per_second = run.config.tokens_per_step / step_seconds
        joules, memory_bytes, squared_tokens = self._over_ranks(run)
        attended = attended_tokens(run, squared_tokens, steps)
        # The counter also runs while metrics are written, so power is over all the time elapsed.
        loss, *metrics = mean_values(outcome.loss_and_tokens)
        now_seconds = time.perf_counter()
        elapsed_seconds, self.read_at_seconds = now_seconds - self.read_at_seconds, now_seconds
        return {
            "step": run.step,
            "tokens": _tokens(run),
            "loss": loss,
            **dict(zip(run.objective.metrics, metrics, strict=True)),
            "lr": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
            "step_seconds": step_seconds,
            "tokens_per_second": tokens_per_second,
            **self._per_gpu(run, tokens_per_second, attended),
            "energy_joules": joules,
            "joules_per_token": (
                None if joules is None else joules / (steps * run.config.tokens_per_step)
            ),
            "power_watts": None if joules is None else joules / elapsed_seconds,
            "memory_bytes": memory_bytes,
            "data_wait_seconds": run.timings.data_wait_seconds,
            "checkpoint_seconds": run.timings.checkpoint_seconds,
        }

    def _per_gpu(self, run: TrainingRun, tokens_per_second: float, attended: float) -> Record:
        """Rates of one GPU, `attended` tokens to a sequence; null on a machine without."""
        if run.process.device.type != "cuda":
            keys = "tokens_per_second_per_gpu tflops_per_gpu_causal tflops_per_gpu_full mfu"
            return dict.fromkeys(keys.split())
        per_gpu = tokens_per_second / run.process.world_size
        flops_causal = flops_per_token(run.config.model, attended, causal=True)
        causal, full = tflops(per_gpu, flops_causal), tflops(per_gpu, self.flops_full)
        if self.peak is not None and run.process.is_first:
            check_below_peak(causal, self.peak, run.config.precision.mode)
        return {
            "tokens_per_second_per_gpu": per_gpu,
            "tflops_per_gpu_causal": causal,
            "tflops_per_gpu_full": full,
            "mfu": mfu(causal, None if self.peak is None else self.peak.bf16_tflops),
        }

    def _over_ranks(self, run: TrainingRun) -> tuple[float | None, int, float]:
        """Since the last line: energy of all GPUs (null if any is unread), the largest memory, and
        the sum of all ranks' squared document lengths.

        Runs on the CPU: host values must not wait for the GPU.
        """
        joules = self.energy.read_joules()
        known = joules is not None and self.joules is not None
        used = joules - self.joules if joules is not None and self.joules is not None else 0.0
        self.joules = joules
        squared_tokens = run.timings.squared_document_tokens
        sums = torch.tensor([used, 0.0 if known else 1.0, squared_tokens], dtype=torch.float64)
        memory = torch.tensor([peak_memory_bytes()])
        dist.all_reduce(sums)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        return (None if sums[1] else float(sums[0])), int(memory), float(sums[2])


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the records of later steps, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line)
    write_text_atomically(path, "".join(kept))


def _tokens(run: TrainingRun) -> int:
    return run.consumed_samples * run.config.data.sequence_length
