"""Checkpoints moved between layouts, precisions and backends, with the optimizer's state whole.

    python -m tools.soak.layout_matrix --out /tmp/matrix --table matrix.md

For each (save, load) pair a run of 10 steps saves at step 5; its checkpoint is loaded at another
layout, and

* the losses of the next 5 steps are those of steps 6 to 10 of the run that was never moved.  Where
  the precision changes too, they are those of the same checkpoint loaded in that precision by one
  process.  Bounds, of the loss: fp32 1e-5 (sums in another order, amplified by Adam:
  `tests/distributed/test_layouts.py`); bf16 2^-9 (its rounding, the same place); fp8 2e-3 (each
  rank scales its own part of a weight: `test_fused_layouts.py`);
* the state is saved again at once, and every tensor of the first checkpoint (weights, fp32 masters,
  both moments), whole, is in the second, bit for bit.  fp32 weights come from the masters, and have
  none of their own.

Controls, one a precision: a load that loses the moments must be seen by the second comparison, and
in fp32 by the losses; in bf16 and fp8 five steps without them differ by less than the rounding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.soak.trial import start_ranks, write_trial

SAVE_AT, STEPS = 5, 10
BOUNDS = {"fp32": 1e-5, "bf16": 2**-9, "fp8": 2e-3}

# Processes, and what is set for the layout.
LAYOUTS = {
    "1": (1, ""),
    "TP2": (2, "parallel.tensor=2"),
    "TP2 SP": (2, "parallel.tensor=2 parallel.sequence=true"),
    "TP4": (4, "parallel.tensor=4"),
    "PP2": (2, "parallel.pipeline=2"),
    "PP2 VPP2": (2, "parallel.pipeline=2 parallel.virtual_pipeline=2"),
    "PP4": (4, "parallel.pipeline=4"),
    "CP2": (2, "parallel.context=2"),
    "DP2": (2, ""),
    "DP2 replicated": (2, "parallel.distributed_optimizer=false"),
    "DP4": (4, ""),
    "TP2 PP2 SP": (4, "parallel.tensor=2 parallel.pipeline=2 parallel.sequence=true"),
    "TP2 DP2": (4, "parallel.tensor=2"),
    "TP2 DP2 replicated": (4, "parallel.tensor=2 parallel.distributed_optimizer=false"),
    "TP2 CP2": (4, "parallel.tensor=2 parallel.context=2"),
    "PP2 DP2": (4, "parallel.pipeline=2"),
    "PP2 VPP2 CP2": (4, "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.context=2"),
}


@dataclass(frozen=True)
class Place:
    """A layout, a precision and a backend."""

    layout: str
    mode: str
    backend: str

    @property
    def processes(self) -> int:
        """How many processes it takes."""
        return LAYOUTS[self.layout][0]

    @property
    def overrides(self) -> list[str]:
        """Its part of the configuration."""
        layout = LAYOUTS[self.layout][1].split()
        return [*layout, f"precision.mode={self.mode}", f"model.backend={self.backend}"]

    def __str__(self) -> str:
        return f"{self.layout}, {self.mode}, {self.backend}"


def places(mode: str, backend: str, *layouts: str) -> list[Place]:
    """Some layouts with one precision and backend."""
    return [Place(layout, mode, backend) for layout in layouts]


def fp32(*layouts: str) -> list[Place]:
    """On plain megatron-core."""
    return places("fp32", "reference", *layouts)


def bf16(*layouts: str) -> list[Place]:
    """On the fused blocks."""
    return places("bf16", "triton", *layouts)


def fp8(*layouts: str) -> list[Place]:
    """Delayed scales, on the fused blocks."""
    return places("fp8", "triton", *layouts)


MATRIX: dict[Place, list[Place]] = {
    fp32("TP2 PP2 SP")[0]: [
        *fp32("1", "DP2", "DP2 replicated", "CP2", "PP2 VPP2"),
        *places("fp32", "triton", "TP4"),
    ],
    fp32("DP4")[0]: fp32("TP2 DP2 replicated", "PP2 VPP2 CP2", "TP2 SP", "PP4"),
    fp32("DP2 replicated")[0]: fp32("PP2 DP2", "TP2 CP2", "1"),
    fp32("PP2 VPP2 CP2")[0]: [*fp32("TP2 DP2", "DP2"), *bf16("DP2")],
    bf16("PP2 VPP2")[0]: bf16("TP2 DP2", "DP2 replicated", "CP2", "PP2"),
    bf16("TP2 DP2")[0]: [
        *bf16("1", "DP4", "PP2 VPP2 CP2", "TP2 PP2 SP"),
        *places("bf16", "reference", "PP2"),
        *fp32("TP2 CP2"),
    ],
    bf16("DP2 replicated")[0]: [*bf16("TP2 SP", "PP2 DP2"), *fp8("PP2")],
    places("bf16", "reference", "PP4")[0]: [*bf16("TP2", "DP2"), *fp32("DP2 replicated")],
    fp8("TP2 SP")[0]: [*fp8("1", "PP2 DP2", "DP2 replicated"), *bf16("PP2")],
    fp8("PP2 DP2")[0]: [*fp8("TP2 DP2", "CP2", "PP2 VPP2"), *fp32("1")],
}
CONTROLS = [*fp32("DP4"), *bf16("TP2 DP2"), *fp8("PP2 DP2")]


def write_config(folder: Path) -> Path:
    """Tokens and a model whose every axis divides by 4, and by 16 where FP8 asks for it."""
    path = write_trial(folder, STEPS, 9)
    tree = yaml.safe_load(path.read_text())
    tree["model"].update(
        num_layers=4, ffn_hidden_size=128, num_attention_heads=8, num_query_groups=4
    )
    tree["training"]["save_every"] = None
    path.write_text(yaml.safe_dump(tree))
    return path


def train_and_save(config_path: str, overrides: list[str]) -> int:
    """One rank of the run that is never moved; the losses of its steps after the save."""
    from litespark.config.load import load_config
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.setup import set_up
    from litespark.training.step import train_step

    run = set_up(load_config(config_path, overrides))
    while run.step < SAVE_AT:
        train_step(run)
    Checkpointing().save_now(run)
    _train_on(run)
    return 0


def move(config_path: str, overrides: list[str], loses_moments: bool) -> int:
    """One rank that loads, saves what it has loaded, and trains on."""
    from litespark.checkpoint import load
    from litespark.config.load import load_config
    from litespark.training import setup
    from litespark.training.hooks.checkpointing import Checkpointing

    def without_moments(*arguments: Any) -> Any:
        state = load.load_checkpoint(*arguments)
        for each in getattr(arguments[2], "chained_optimizers", [arguments[2]]):
            for tensors in each.optimizer.state.values():
                tensors["exp_avg"].zero_()
                tensors["exp_avg_sq"].zero_()
        return state

    if loses_moments:
        setup.load_checkpoint = without_moments
    run = setup.set_up(load_config(config_path, overrides))
    assert run.step == SAVE_AT, "it did not resume"
    Checkpointing().save_now(run)
    _train_on(run)
    return 0


def _train_on(run: Any) -> None:
    from litespark.training.step import mean_loss, train_step

    losses = []
    while run.step < STEPS:
        losses.append(mean_loss(train_step(run).loss_and_tokens))
    run.close()
    if run.process.is_first:
        (run.folder / "losses.json").write_text(json.dumps(losses))


class Matrix:
    """The pairs that were tried, and what came out."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.config = str(write_config(out))
        self.count = 0
        self.by_one_process: dict[tuple[Place, str], list[float]] = {}

    def save(self, place: Place) -> Path:
        """Train at a place; the folder with the checkpoint and the losses after it."""
        return self._run(place, train_and_save, [])

    def load(self, saved: Path, place: Place, loses_moments: bool = False) -> Path:
        """Load at another; the folder with what was loaded, saved again, and the losses."""
        return self._run(place, move, [f"run.resume={_checkpoint(saved)}"], loses_moments)

    def expected(self, saved: Path, source: Place, target: Place) -> list[float]:
        """Losses of the run that was not moved to another layout."""
        if source.mode == target.mode:
            return losses(saved)
        key = (source, target.mode)
        if key not in self.by_one_process:
            alone = self.load(saved, Place("1", target.mode, target.backend))
            self.by_one_process[key] = losses(alone)
        return self.by_one_process[key]

    def _run(self, place: Place, target: Any, overrides: list[str], *arguments: Any) -> Path:
        self.count += 1
        folder = self.out / f"run_{self.count}"
        shutil.rmtree(folder, ignore_errors=True)
        overrides = [*place.overrides, *overrides, f"run.output_dir={folder}"]
        log = folder.with_suffix(".log")
        ranks = start_ranks(place.processes, log, target, self.config, overrides, *arguments)
        for rank in ranks:
            rank.join(300)
        if any(rank.exitcode != 0 for rank in ranks):  # None: it hangs
            raise SystemExit(f"{place}: failed, see {log}")
        return folder


def losses(folder: Path) -> list[float]:
    """Of the steps after the checkpoint."""
    return json.loads((folder / "losses.json").read_text())


def off_by(found: list[float], wanted: list[float]) -> float:
    """The largest difference of two lists, relative to the second's."""
    pairs = zip(found, wanted, strict=True)
    return max(abs(loss - want) / want for loss, want in pairs)


def differing_tensors(saved: Path, again: Path) -> tuple[int, list[str]]:
    """How many tensors were compared, and the keys of those that are not the same bit for bit."""
    before, after = (_whole_tensors(_checkpoint(folder)) for folder in (saved, again))
    master = "optimizer.fp32_param."
    pairs = []  # key afterwards, and what it must hold
    for key, tensor in before.items():
        if key.startswith(master):
            pairs += [(key, tensor)] if key in after else []
        elif master + key in after:
            pairs += [(key, tensor)] + [(master + key, tensor)] * (master + key not in before)
        else:
            pairs.append((key, before.get(master + key, tensor)))
    differing = [
        key for key, tensor in pairs if key not in after or not _same_bits(tensor, after[key])
    ]
    return len(pairs), differing


def _same_bits(tensor: Any, other: Any) -> bool:
    import torch

    # A weight in half precision is its master, rounded; loading rounds it alike.
    if tensor.dtype != other.dtype:
        tensor = tensor.to(other.dtype)
    return torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))


def _whole_tensors(checkpoint: Path) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = str(checkpoint / "state")
    kinds = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(kind.size, dtype=kind.properties.dtype)
        for key, kind in kinds.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


def _checkpoint(folder: Path) -> Path:
    return next((folder / "checkpoints").glob("step_*"))


def main(arguments: list[str] | None = None) -> int:
    """Try all pairs; 0 when none is off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--table", type=Path, help="write the table here, as Markdown")
    args = parser.parse_args(arguments)
    matrix, rows, faults, started = Matrix(args.out), [], 0, time.monotonic()
    for source, targets in MATRIX.items():
        saved = matrix.save(source)
        for target in [*targets, *([source] if source in CONTROLS else [])]:
            is_control = target == source
            moved = matrix.load(saved, target, loses_moments=is_control)
            off = off_by(losses(moved), matrix.expected(saved, source, target))
            bound = BOUNDS[target.mode]
            compared, differing = differing_tensors(saved, moved)
            is_right = off <= bound and not differing
            if is_control:
                is_right = bool(differing) and (off > bound or target.mode != "fp32")
            faults += not is_right
            cells = (
                *(source, f"{target}{', moments lost' * is_control}"),
                *(f"{off:.1e}", f"{bound:.1e}", f"{compared - len(differing)} of {compared}"),
                "yes" if is_right else "NO",
            )
            rows.append(f"| {' | '.join(map(str, cells))} |")
            print(rows[-1], *([] if is_control else differing[:3]), flush=True)
    pairs = sum(len(targets) for targets in MATRIX.values())
    summary = (
        f"{pairs} pairs, {len(rows) - pairs} controls, {faults} faults, "
        f"{time.monotonic() - started:.0f} s"
    )
    print(summary)
    if args.table is not None:
        head = (
            "| saved at | loaded at | losses off by at most | bound | tensors bit for bit | as "
            "expected |\n|---|---|--:|--:|--:|---|"
        )
        args.table.write_text("\n".join([summary, "", head, *rows]) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
