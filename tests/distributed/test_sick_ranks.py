"""A rank that computes wrongly, and one that is slow, are found and named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.runs import config_tree, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

MICRO_BATCHES = 2
RECHECK = ["resilience.recheck_every=2"]


@pytest.fixture
def config_path(tmp_path) -> str:
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["training"].update(steps=6)
    tree["batch"] = {"micro": 2, "global": 2 * 2 * MICRO_BATCHES}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def sick_rank(rank, world_size, config_path, overrides, kind, sick):
    """Train with all hooks; rank `sick` is off by a bit once in step 4, always, or slow."""
    from litespark.checkpoint.sharded import bare_model
    from litespark.config import load_config
    from litespark.errors import GuardError
    from litespark.training.loop import train
    from litespark.training.run import build_hooks
    from litespark.training.setup import set_up

    run = set_up(load_config(config_path, overrides))
    clean, passes, error = run.forward_step, 0, None

    def forward_step(batches, model):
        nonlocal passes
        passes += 1
        if rank == sick and kind == "slow":
            time.sleep(0.5)  # more than a busy machine takes from another rank
        output, loss_function = clean(batches, model)
        # Step 2 was computed twice.
        flips = kind == "random" or (kind == "once" and passes == (3 + 1) * MICRO_BATCHES + 1)

        def sick_function(output):
            loss, tokens, report = loss_function(output)
            factor = 1 + 2.0**-40 * passes if rank == sick and flips else 1.0
            return loss, tokens, {key: value * factor for key, value in report.items()}

        return output, sick_function

    run.forward_step = forward_step
    try:
        train(run, build_hooks(run))
    except GuardError as found:
        error = str(found)
    run.close()
    weights = [p.detach().clone() for c in run.chunks for p in bare_model(c).parameters()]
    return error, run.step, weights


def events(folder: Path, name: str) -> list[str]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event["detail"] for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.parametrize("overrides", [[], ["parallel.pipeline=2", "batch.global=4"]])
def test_a_flipped_bit_ends_the_run(overrides, config_path):
    """On the rank that reports losses: both replicas' do, of the pipeline the last stage's."""
    found = run_distributed(sick_rank, 2, config_path, [*RECHECK, *overrides], "once", 1)
    for error, step, _ in found:
        assert error is not None
        assert "step 4: the same weights and batch gave other losses" in error
        assert "rank 1 on" in error
        assert "rank 0 on" not in error
        assert step == 3, "the update was not made"


def test_without_the_check_nobody_knows(config_path):
    for error, step, _ in run_distributed(sick_rank, 2, config_path, [], "once", 1):
        assert error is None
        assert step == 6


def test_a_computation_that_is_not_deterministic_is_no_fault(config_path, tmp_path):
    for error, step, _ in run_distributed(sick_rank, 2, config_path, RECHECK, "random", 1):
        assert error is None
        assert step == 6
    assert len(events(tmp_path / "run", "not_rechecked")) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
        ["model.backend=triton", "precision.mode=fp8", "precision.recipe=tensorwise"],
    ],
    ids=["dp2", "sp2", "overlap", "fp8"],
)
def test_checking_changes_nothing(overrides, config_path, tmp_path):
    checked = run_distributed(sick_rank, 2, config_path, [*RECHECK, *overrides], "healthy", 1)
    options = [*overrides, f"run.output_dir={tmp_path / 'other'}"]
    unchecked = run_distributed(sick_rank, 2, config_path, options, "healthy", 1)
    for (error, _, one), (_, _, other) in zip(checked, unchecked, strict=True):
        assert error is None
        assert all(map(torch.equal, one, other))


def test_the_slow_rank_is_named(config_path, tmp_path):
    overrides = ["resilience.straggler_every=3", "batch.global=8"]
    run_distributed(sick_rank, 4, config_path, overrides, "slow", 2)
    details = events(tmp_path / "run", "straggler")
    assert len(details) == 2
    assert all("slowest rank 2 on" in detail for detail in details)
