"""What a run left in its folder, read for a report.

A folder holds `metrics.jsonl` (one object a logged step, and one an evaluation), `config.yaml`, and
perhaps `events.jsonl`.  Files come from runs that may have crashed, may still be going on, or may
have been edited by hand: a line that is no record is an error with its place, except a last line
without its line feed, which is a write in progress.

A run that resumes from a checkpoint writes steps again that a crash had lost.  Where the steps go
back, the earlier records of the repeated steps are dropped: the weights of today come from the
later ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from litespark.errors import UserError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"

# Joules since the line before, by what they were used for; the names in metrics.jsonl.
ENERGY_KEYS = (
    *("energy_joules", "evaluation_joules", "checkpoint_joules", "idle_joules"),
    "host_joules",
)

# Events that a chart marks, by name, and the words beside the mark.
_MARKED = {
    "bad_step": "bad step",
    "rolled_back": "rolled back",
    "fp8_guard": "FP8 guard",
    "hang": "hang",
    "straggler": "straggler",
    "stopped": "stopped",
    "checkpoint_failed": "save failed",
}

_NAN = math.nan


@dataclass(frozen=True)
class Event:
    """Something that happened to the run; `step` is None when the event does not say.

    `fields` are the detail's where it is an object.
    """

    step: int | None
    name: str
    detail: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunLog:
    """The records of one run; a value that was not measured or is not finite is NaN.

    `steps` and each column of `columns` have one entry a logged step; `rewound_steps` are the last
    steps kept where the records go back, `non_finite_losses` counts losses that are NaN or
    infinite.  `lost_joules` were used for steps that were done again,
    `tail_joules` after the last line of a start, by key.
    """

    folder: Path
    name: str
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    rewound_steps: list[int] = field(default_factory=list)
    non_finite_losses: int = 0
    lost_joules: float = 0.0
    tail_joules: dict[str, list[float]] = field(default_factory=dict)
    is_cut_short: bool = False

    def column(self, key: str) -> list[float]:
        """The values of `key` at `steps`; all NaN when no record has it."""
        return self.columns.get(key) or [_NAN] * len(self.steps)

    def finite(self, key: str) -> list[float]:
        """The measured values of `key`, without the steps where there is none."""
        return [value for value in self.column(key) if math.isfinite(value)]

    def marks(self) -> list[tuple[float, str]]:
        """What happened on the axis of steps: restarts, and what guards did."""
        found = {(float(step), "resumed") for step in self.resume_steps()}
        for event in self.events:
            label = _MARKED.get(event.name)
            if label is not None and event.step is not None:
                found.add((float(event.step), label))
        return sorted(found)

    def resume_steps(self) -> list[int]:
        """The steps at which the run went on after an interruption, in order."""
        told = {e.step for e in self.events if "resume" in e.name.lower() and e.step is not None}
        return sorted(told | set(self.rewound_steps))


def read_run(folder: Path) -> RunLog:
    """Read a run's folder.

    Raises:
        UserError: when the folder or its metrics are missing, or a line is no record.
    """
    if not folder.is_dir():
        raise UserError(str(folder), "there is no such folder", "Give the folder of a run.")
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(
            str(path),
            "the folder holds no metrics",
            "Give a run's output_dir after its first logged step.",
        )
    run = RunLog(folder=folder, name=folder.resolve().name)
    for where, record in _records(path, run):
        _add(run, where, record)
    if not run.steps:
        raise UserError(str(path), "no step has been logged yet", "Wait for the first one.")
    _read_config(run)
    if (folder / EVENTS_FILE).is_file():
        run.events = [_event(record) for _, record in _records(folder / EVENTS_FILE, run)]
    _read_tails(run)
    return run


def _read_tails(run: RunLog) -> None:
    """The joules that came after the last line, which the event at a run's end tells."""
    for event in run.events:
        tail = event.fields.get("tail")
        if event.name != "energy" or not isinstance(tail, dict):
            continue
        for key in ENERGY_KEYS:
            value = tail.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                run.tail_joules.setdefault(key, []).append(float(value))


def _records(path: Path, run: RunLog) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
                if not line.endswith(b"\n"):
                    run.is_cut_short = True
                    return
                raise UserError(where, "the line is no JSON", "Mend or remove the line.") from error
            if not isinstance(record, dict):
                raise UserError(where, "the line is no JSON object", "Mend or remove the line.")
            yield where, record


def _add(run: RunLog, where: str, record: dict[str, Any]) -> None:
    """Append one record of metrics."""
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(
            where, f"step is {step!r}, not a whole number from 0", "Mend or remove the line."
        )
    if "validation_loss" in record:
        run.validation[step] = _number(where, "validation_loss", record["validation_loss"])
        if "loss" not in record:
            return
    _rewind(run, step)
    if not isinstance(record.get("loss"), type(None)):
        run.non_finite_losses += math.isnan(_number(where, "loss", record["loss"]))
    for key, value in record.items():
        if key in ("step", "validation_loss"):
            continue
        column = run.columns.setdefault(key, [])
        column.extend([_NAN] * (len(run.steps) - len(column)))
        column.append(_number(where, key, value))
    run.steps.append(step)
    for column in run.columns.values():
        column.extend([_NAN] * (len(run.steps) - len(column)))


def _rewind(run: RunLog, step: int) -> None:
    """Drop what was recorded for `step` and later ones before the run went back."""
    if not run.steps or run.steps[-1] < step:
        return
    while run.steps and run.steps[-1] >= step:
        run.steps.pop()
        for key, column in run.columns.items():
            value = column.pop()
            if key in ENERGY_KEYS and math.isfinite(value):
                run.lost_joules += value
    run.validation = {at: loss for at, loss in run.validation.items() if at < step}
    run.rewound_steps = [at for at in run.rewound_steps if at < step]
    run.rewound_steps.append(run.steps[-1] if run.steps else step)


def _number(where: str, key: str, value: object) -> float:
    """A value of a record as a float; null and everything not finite become NaN."""
    if value is None:
        return _NAN
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(where, f"{key} is {value!r}, not a number", "Mend or remove the line.")
    try:
        number = float(value)
    except OverflowError:
        return _NAN
    return number if math.isfinite(number) else _NAN


def _read_config(run: RunLog) -> None:
    """Read the resolved configuration, if the folder has it, and the run's name in it."""
    path = run.folder / CONFIG_FILE
    if not path.is_file():
        return
    try:
        run.config_text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(run.config_text)
    except UnicodeDecodeError as error:
        raise UserError(str(path), "the file is no UTF-8 text", "Restore the file.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UserError(where, "the file is no YAML", "Restore or remove the file.") from error
    if isinstance(config, dict):
        run.config = config
    section = run.config.get("run")
    if isinstance(section, dict) and isinstance(section.get("name"), str):
        run.name = section["name"]


def _event(record: dict[str, Any]) -> Event:
    """One event; a detail that is no text is shown as JSON."""
    step, detail = record.get("step"), record.get("detail", "")
    if step is None and isinstance(detail, dict):
        step = detail.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool)
    return Event(
        step=step if is_step else None,
        name=str(record.get("event", "")),
        detail=detail if isinstance(detail, str) else json.dumps(detail),
        fields=detail if isinstance(detail, dict) else {},
    )
