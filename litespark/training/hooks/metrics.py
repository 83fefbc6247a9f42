"""Measures, and writes each measurement to every place that wants it.

`metrics.jsonl` is the record that reports are made from; TensorBoard, Weights & Biases and the
console show the same numbers.  A value that cannot be measured here is null, never a guess.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from litespark.metering.flops import flops_per_token, mfu, tflops
from litespark.metering.gpu_peaks import check_below_peak, peak_for_device
from litespark.metering.memory import peak_memory_bytes
from litespark.metering.meters import HOST_KEY, KEYS
from litespark.training.hooks.console import Console
from litespark.training.hooks.sinks import (
    MlflowSink,
    PrometheusSink,
    TensorBoardSink,
    WandbSink,
)
from litespark.training.loop import Hook
from litespark.training.state import Timings, TrainingRun
from litespark.training.step import StepOutcome, attended_tokens, mean_values
from litespark.utils.files import write_text_atomically
from litespark.utils.line_log import LineLog

Record = dict[str, Any]


class MetricsWriter:
    """Hands records to metrics.jsonl and the other sinks; on other ranks than the first, to none.

    Lines of steps after the one the run resumes from are dropped: they are written again.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.is_first = run.process.is_first
        self.file: LineLog | None = None
        self.tensorboard: TensorBoardSink | None = None
        self.services: list[WandbSink | MlflowSink | PrometheusSink] = []
        if not self.is_first:
            return
        self.console = Console(run)
        config = run.config
        if config.logging.wandb_project is not None:
            self.services.append(WandbSink(config.logging.wandb_project, config, run.folder))
        if config.logging.mlflow_experiment is not None:
            self.services.append(MlflowSink(config.logging.mlflow_experiment, config, run.folder))
        if config.metering.prometheus_port is not None:
            port, address = config.metering.prometheus_port, config.metering.prometheus_address
            self.services.append(PrometheusSink(port, address, config))

    def begin(self, run: TrainingRun) -> None:
        """Open the files, behind the run's step; what they say of later steps is dropped."""
        if not self.is_first:
            return
        self._close_files()
        path = run.folder / "metrics.jsonl"
        drop_lines_after(path, run.step)
        self.file = LineLog(path)
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
            for service in self.services:
                service.close()

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
        self.file.write(json.dumps(finite))
        for sink in (self.tensorboard, *self.services):
            if sink is not None:
                sink.write(finite)


class StepMetrics(Hook):
    """Every `training.log_every` steps: this step's loss; speed, energy and memory since the last.

    The loss is the step's own, not a mean since the last line: it is then the same whether or not
    the run was stopped and resumed in between.
    """

    def __init__(self, writer: MetricsWriter) -> None:
        self.writer = writer
        self.totals: dict[str, float | None] = dict.fromkeys(KEYS, 0.0)

    def on_start(self, run: TrainingRun) -> None:
        """Learn what the rates are held against."""
        model, length = run.config.model, run.config.data.sequence_length
        self.flops_full = flops_per_token(model, length, causal=False)
        self.peak = peak_for_device(run.process.device.name)
        if run.config.metering.check_power:
            run.meters.start_polling()

    def on_state(self, run: TrainingRun) -> None:
        """Start the counters."""
        self.writer.begin(run)
        self.logged_step = run.step
        run.meters.enter("training")
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
        trained = joules["energy_joules"]
        # What was used before the first step is in no time that is counted here.
        used = [value for key, value in joules.items() if key not in (HOST_KEY, "idle_joules")]
        attended = attended_tokens(run, squared_tokens, steps)
        # The counter also runs while metrics are written, so power is over all the time elapsed.
        loss, *metrics = mean_values(outcome.loss_and_tokens)
        now_seconds = time.perf_counter()
        elapsed_seconds, self.read_at_seconds = now_seconds - self.read_at_seconds, now_seconds
        return {
            "step": run.step,
            "tokens": _tokens(run),
            "loss": loss,
            **dict(zip(run.metrics, metrics, strict=True)),
            "lr": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
            "step_seconds": step_seconds,
            "tokens_per_second": tokens_per_second,
            **self._per_gpu(run, tokens_per_second, attended),
            **joules,
            "joules_per_token": (
                None if trained is None else trained / (steps * run.config.tokens_per_step)
            ),
            "power_watts": _watts(used, elapsed_seconds),
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

    def take_joules(self, run: TrainingRun, others: Sequence[float] = ()) -> _Sums:
        """Joules of all ranks since the last call by `KEYS` (null if any is unread), and the sums
        of `others`; a collective call.

        Runs on the CPU: host values must not wait for the GPU.
        """
        own = run.meters.take()
        unknown = [float(value is None) for value in own]
        sums = torch.tensor(
            [*(value or 0.0 for value in own), *unknown, *others], dtype=torch.float64
        )
        dist.all_reduce(sums)
        summed: list[float] = sums.tolist()
        count = len(own)
        joules = {
            key: None if summed[count + index] else summed[index] for index, key in enumerate(KEYS)
        }
        for key, value in joules.items():
            total = self.totals[key]
            self.totals[key] = None if value is None or total is None else total + value
        return _Sums(joules, summed[2 * count :])

    def _over_ranks(self, run: TrainingRun) -> tuple[dict[str, float | None], int, float]:
        """Since the last line: joules by phase, the largest memory of any rank, and the sum of all
        ranks' squared document lengths.
        """
        sums = self.take_joules(run, [run.timings.squared_document_tokens])
        memory = torch.tensor([peak_memory_bytes()])
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        return sums.joules, int(memory), sums.others[0]


class _Sums(NamedTuple):
    joules: dict[str, float | None]
    others: list[float]


def _watts(joules: Sequence[float | None], seconds: float) -> float | None:
    """Watts of joules over `seconds`; None if any was not measured."""
    known = [value for value in joules if value is not None]
    return sum(known) / seconds if len(known) == len(joules) else None


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
