"""The planner's bytes against those that megatron-core and the optimizer really allocate.

    python -m tools.checks.plan_layouts --json tools/checks/results/plan_layouts.json

Starts gloo processes on the CPU for every layout, builds the run as `litespark train` does with the
optimizer of a GPU, makes one update, and compares each rank's weights, gradients and optimizer
state, padding included, with `litespark.metering.plan.memory.model_bytes`.  They must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.support.runs import config_tree, write_shard
from tests.support.spawn import run_distributed

Bytes = dict[str, int]

# name: (processes, overrides).  Models are small, so that no bucket is ever full, but for "large".
BASE = [
    *("model.num_layers=4", "model.hidden_size=72", "model.ffn_hidden_size=104"),
    *("model.num_attention_heads=8", "model.num_query_groups=4", "model.head_dim=10"),
    *("model.vocab_size=120", "precision.mode=bf16", "batch.global=24", "batch.micro=1"),
]
_TP2, _TP4, _PP2, _CP2 = (
    f"parallel.{k}" for k in ("tensor=2", "tensor=4", "pipeline=2", "context=2")
)
_SP, _VPP2 = "parallel.sequence=true", "parallel.virtual_pipeline=2"
_REPLICATED = "parallel.distributed_optimizer=false"
_TIED, _FP32 = "model.tie_embeddings=true", "precision.mode=fp32"
_OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
_LARGE = ("model.vocab_size=40000", "model.hidden_size=1032", "model.num_attention_heads=8")

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "single, replicated": (1, [_REPLICATED]),
    "single, tied": (1, [_TIED]),
    "single, fp32": (1, [_FP32]),
    "DP2": (2, []),
    "DP2, replicated": (2, [_REPLICATED]),
    "DP2, overlapped, several buckets": (2, [*_OVERLAP, *_LARGE]),
    "DP3": (3, []),
    "DP4, fp32": (4, [_FP32]),
    "TP2": (2, [_TP2]),
    "TP2+SP x DP2": (4, [_TP2, _SP]),
    "TP4+SP": (4, [_TP4, _SP]),
    "TP4, more ranks than groups": (4, [_TP4, "model.num_query_groups=2"]),
    "PP2": (2, [_PP2]),
    "PP2, tied": (2, [_PP2, _TIED]),
    "PP2 x DP2, tied, overlapped": (4, [_PP2, _TIED, *_OVERLAP]),
    "PP2 x VPP2": (2, [_PP2, _VPP2]),
    "PP4": (4, ["parallel.pipeline=4"]),
    "CP2 x DP2": (4, [_CP2]),
    "TP2 x PP2 x VPP2, tied": (4, [_TP2, _PP2, _VPP2, _TIED]),
    "TP2 x CP2": (4, [_TP2, _CP2]),
    "DP2 x TP2, weights in FP8 alone": (
        4,
        [
            *(_TP2, "precision.mode=fp8", "precision.primary_weights=fp8"),
            *("model.hidden_size=64", "model.head_dim=8", "model.ffn_hidden_size=96"),
            *("model.num_attention_heads=8", "model.backend=triton"),
            "precision.bf16_last_layers=1",
        ],
    ),
    "TP2, biases and norms of queries and keys": (
        2,
        [_TP2, "model.qkv_bias=true", "model.qk_norm=true"],
    ),
}


def elements_of_rank(
    rank: int, world_size: int, config_path: str, names: list[str]
) -> dict[str, tuple[Bytes, Bytes]]:
    """What the planner says of each layout, and what this rank really holds, in bytes."""
    from litespark.config import load_config
    from litespark.parallel.groups import stop_process_group

    found = {}
    for name in names:
        # Each has a store of its own: what the groups before have left in theirs would be found.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        config = load_config(config_path, [*BASE, *LAYOUTS[name][1]])
        try:
            found[name] = _compare(config, rank, world_size)
        finally:
            stop_process_group()
    return found


def _compare(config: Any, rank: int, world_size: int) -> tuple[Bytes, Bytes]:
    from litespark.metering.plan.memory import model_bytes
    from litespark.training import setup
    from litespark.training.optimizer import FusedOptimizer

    process = setup.start_processes(config)
    run = setup.build_run(config, process)
    # The optimizer that trains on a GPU; it makes its moments at the first step.
    optimizer: Any = run.optimizer
    if not isinstance(optimizer, FusedOptimizer):
        optimizer = setup.build_optimizer(config, run.chunks, fused=True)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1e-3)  # type: ignore[attr-defined]
    optimizer.step()
    place = run.layout.coordinates(rank)
    shard = place.data * config.parallel.context + place.context
    planned = model_bytes(config, world_size, place.pipeline, shard)
    return planned, _measured(run, optimizer)


def _measured(run: Any, optimizer: Any) -> Bytes:
    buffers = [b for chunk in run.chunks for b in chunk.buffers]
    weights = sum(
        b.param_data.nbytes if b.param_data is not None else sum(p.nbytes for p in b.params)
        for b in buffers
    )
    gradients = sum(b.grad_data.nbytes for b in buffers)
    held = {p.untyped_storage().data_ptr() for chunk in run.chunks for p in chunk.parameters()}
    state = 0
    for adam in optimizer.adams:
        for group in adam.param_groups:
            for master in group["params"]:
                moments = adam.state.get(master, {})
                state += sum(moment.nbytes for moment in moments.values())
                # In fp32 the masters are the model's own weights.
                state += 0 if master.untyped_storage().data_ptr() in held else master.nbytes
    return {"weights": weights, "gradients": gradients, "optimizer": state}


def compare_layouts(folder: Path, names: list[str]) -> dict[str, list[tuple[Bytes, Bytes]]]:
    """Planned and real bytes of every rank of each layout; one start of processes a world size."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree(folder, write_shard(folder / "tokens"))))
    found: dict[str, list[tuple[Bytes, Bytes]]] = {}
    for world_size in sorted({LAYOUTS[name][0] for name in names}):
        chosen = [name for name in names if LAYOUTS[name][0] == world_size]
        ranks = run_distributed(elements_of_rank, world_size, str(path), chosen)
        found |= {name: [rank[name] for rank in ranks] for name in chosen}
    return found


def _lines(record: dict[str, list[dict[str, Bytes]]]) -> str:
    """JSON with one line a layout."""
    rows = (f" {json.dumps(name)}: {json.dumps(ranks)}" for name, ranks in record.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """Compare all layouts; 0 when every figure is exact."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures of all ranks")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="plan-layouts-") as folder:
        found = compare_layouts(Path(folder), list(LAYOUTS))
    wrong = 0
    for name, ranks in found.items():
        faults = [(rank, *pair) for rank, pair in enumerate(ranks) if pair[0] != pair[1]]
        wrong += len(faults)
        print(f"{name:40s} {len(ranks)} ranks {'DIFFERS' if faults else 'equal'}", *faults)
    if args.json is not None:
        record = {
            name: [{"planned": planned, "real": real} for planned, real in ranks]
            for name, ranks in found.items()
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(_lines(record))
    print(f"{len(found)} layouts, {wrong} ranks differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
