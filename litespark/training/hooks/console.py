"""What a person sees while training: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from litespark.training.state import TrainingRun


class Console:
    """Shows records; made on the first rank only."""

    def __init__(self, run: TrainingRun) -> None:
        self.total_steps = run.total_steps
        self.tokens_per_step = run.config.tokens_per_step
        self.rich = RichConsole()
        self.progress: Progress | None = None
        if self.rich.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps, left"),
                TimeRemainingColumn(),
                console=self.rich,
            )
            self.task = self.progress.add_task(
                run.config.run.name, total=run.total_steps, completed=run.step
            )
            self.progress.start()

    def show_step(self, record: dict[str, Any]) -> None:
        """Show a logged step."""
        self.print_line(step_line(record, self.total_steps, self.tokens_per_step))
        if self.progress is not None:
            self.progress.update(self.task, completed=record["step"])

    def show_validation(self, record: dict[str, Any]) -> None:
        """Show the result of an evaluation."""
        self.print_line(
            f"step {record['step']}/{self.total_steps} | "
            f"validation loss {record['validation_loss']:.4f}"
            + "".join(f" | {part}" for part in _reward_parts(record, "validation_"))
        )

    def print_line(self, line: str) -> None:
        """Print above the bar, or just print."""
        self.rich.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.progress is not None:
            self.progress.stop()


def step_line(record: dict[str, Any], total_steps: int, tokens_per_step: int) -> str:
    """One line of a logged step, with what could be measured and what is left to the end."""
    parts = [
        f"step {record['step']}/{total_steps}",
        f"loss {record['loss']:.4f}",
        *_reward_parts(record),
        f"lr {record['lr']:.2e}",
        f"grad norm {record['grad_norm']:.3f}",
        f"{record['step_seconds']:.3f} s/step",
        f"{record['tokens_per_second']:,.0f} tokens/s",
    ]
    if record["tflops_per_gpu_causal"] is not None:
        parts.append(f"{record['tflops_per_gpu_causal']:.0f} TFLOP/s per GPU (causal)")
    if record["mfu"] is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record["power_watts"] is not None:
        parts.append(f"{record['power_watts']:,.0f} W")
    if record["joules_per_token"] is not None:
        parts.append(f"{1000 * record['joules_per_token']:.1f} J/1000 tokens")
    left = total_steps - record["step"]
    if left > 0:
        parts.append(f"{duration(left * record['step_seconds'])} left")
        if record["joules_per_token"] is not None:
            joules = left * tokens_per_step * record["joules_per_token"]
            parts.append(f"{energy(joules)} to the end")
    return " | ".join(parts)


def _reward_parts(record: dict[str, Any], prefix: str = "") -> list[str]:
    """What a run on preferences shows beside its loss."""
    accuracy = record.get(f"{prefix}reward_accuracy")
    if accuracy is None:
        return []
    margin = record[f"{prefix}reward_margin"]
    return [f"accuracy {100 * accuracy:.1f} %", f"margin {margin:.3f}"]


def duration(seconds: float) -> str:
    """A time as a person reads it: 42 s, 5 min, 3 h 20 min, 2 d 7 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def energy(joules: float) -> str:
    """Joules as a person reads them, in units of the electricity bill where there are enough."""
    kilowatt_hours = joules / 3.6e6
    if kilowatt_hours < 0.01:
        return f"{joules:,.0f} J"
    if kilowatt_hours < 1000:
        return f"{kilowatt_hours:.3g} kWh"
    return f"{kilowatt_hours / 1000:,.4g} MWh"
