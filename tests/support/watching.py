"""What a run that goes on has written so far."""

from __future__ import annotations

import json
from pathlib import Path


def events(folder: Path) -> list[dict]:
    """The events of a run's folder."""
    return _lines(folder / "events.jsonl")


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step that has been logged; of one that was repeated, the last."""
    return {record["step"]: record["loss"] for record in _lines(folder / "metrics.jsonl")}


def resumed(folder: Path) -> list[str]:
    """The details of the `resumed` events, e.g. `TP2 x CP1 x DP1 x PP1, from step_000000004`."""
    return [event["detail"] for event in events(folder) if event["event"] == "resumed"]


def _lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    text = path.read_text()
    # The last line may be half-written.
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
