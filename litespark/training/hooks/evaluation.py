"""Evaluates on the validation split at intervals, always on the same samples."""

from __future__ import annotations

from litespark.training.hooks.metrics import MetricsWriter
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome, evaluate_means


class Evaluation(Hook):
    """Every `training.eval_every` steps and at the end: the mean loss of the validation split."""

    def __init__(self, writer: MetricsWriter) -> None:
        self.writer = writer
        self.evaluated_step = -1

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Evaluate when it is time."""
        every = run.config.training.eval_every
        if every is not None and run.step % every == 0:
            self._evaluate(run)

    def on_end(self, run: TrainingRun) -> None:
        """Evaluate the final weights, unless that has just been done."""
        if run.config.training.eval_every is not None and self.evaluated_step != run.step:
            self._evaluate(run)

    def _evaluate(self, run: TrainingRun) -> None:
        with run.meters.within("evaluation"):
            loss, *metrics = evaluate_means(run, run.validation, run.config.training.eval_steps)
        self.evaluated_step = run.step
        named = dict(zip(run.metrics, metrics, strict=True))
        self.writer.write_validation(run, loss, named)
