"""Faults of the fused blocks and FP8 that would show in no error: stale weights, altered training.

What the layouts' tests do not reach: several buckets of gathered weights (a small model fits one,
and then any module's hook waits for all of it), evaluation and the guard between steps, a layer
that the guard has moved and a resumed run must move again, and the blockwise recipe under tensor
parallelism.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed.test_layouts import assert_same
from tests.support.runs import write_config, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

FUSED = ["model.backend=triton", "training.eval_every=1"]
FP8 = [*FUSED, "precision.mode=fp8"]
OVERLAPPED = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
# Elements; about one bucket for each matrix.
SMALL_BUCKETS = 2000


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fused_silent_faults")
    shard = write_shard(folder / "tokens")
    return write_config(folder, shard)


def _train(
    rank: int,
    world_size: int,
    config_path: str,
    overrides: list[str],
    bucket_size: int | None = None,
    evaluate_every: int = 0,
    guard_at: tuple[int, ...] = (),
    save_at: int = 0,
) -> tuple[list[tuple[float, float]], list[float], int, list[int]]:
    """Train; losses and norms, evaluations, number of buckets, and layers that the guard moved."""
    from litespark.config import load_config
    from litespark.training import setup
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.hooks.fp8_guard import Fp8Guard
    from litespark.training.step import evaluate_samples, mean_loss, train_step

    setup.DistributedDataParallelConfig = functools.partial(
        setup.DistributedDataParallelConfig, bucket_size=bucket_size
    )
    run = setup.set_up(load_config(config_path, overrides))
    guard = Fp8Guard()
    guard.on_start(run)
    history, evaluations = [], []
    while run.step < (save_at or run.total_steps):
        outcome = train_step(run)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
        if evaluate_every and run.step % evaluate_every == 0:
            evaluations.append(evaluate_samples(run, run.validation, 1))
        if run.step in guard_at:
            guard.compare(run)
    if save_at:
        Checkpointing().save_now(run)
    run.close()
    chunk: Any = run.chunks[0]
    return history, evaluations, len(chunk.bucket_groups), sorted(run.policy.moved_layers)


def train(config_path: str, world_size: int, overrides: list[str], **options: Any) -> Any:
    """What the first rank returns."""
    function = functools.partial(_train, **options)
    return run_distributed(function, world_size, config_path, overrides)[0]


@pytest.mark.parametrize("tied", ["false", "true"])
def test_every_block_waits_for_its_own_bucket(tied, config_path):
    """Weights are gathered bucket by bucket, for modules that the blocks read and never call."""
    options = [f"model.tie_embeddings={tied}"]
    expected, evaluated, _, _ = train(
        config_path,
        1,
        ["model.backend=reference", "training.eval_every=1", *options],
        evaluate_every=3,
    )
    found, found_evaluated, buckets, _ = train(
        config_path,
        2,
        [*FUSED, *OVERLAPPED, *options],
        bucket_size=SMALL_BUCKETS,
        evaluate_every=3,
    )
    assert buckets > 10, "the weights are in few buckets: nothing was tested"
    assert_same(found, expected)
    assert found_evaluated == pytest.approx(evaluated, rel=1e-5)


def test_weights_are_quantised_after_they_have_arrived(config_path):
    """With two ranks a sum has one order: overlapping must not change a bit, without clipping."""
    options = [*FP8, "optimizer.clip_grad=0"]
    expected, _, _, _ = train(config_path, 2, options)
    found, _, buckets, _ = train(config_path, 2, [*options, *OVERLAPPED], bucket_size=SMALL_BUCKETS)
    assert buckets > 10
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]


def test_looking_changes_nothing(config_path):
    """Neither evaluation nor the guard may leave anything behind in the scales of FP8."""
    expected, _, _, _ = train(config_path, 2, FP8)
    found, evaluations, _, _ = train(
        config_path, 2, FP8, evaluate_every=1, guard_at=tuple(range(1, 11))
    )
    assert len(evaluations) == 10
    assert found == expected


def test_a_moved_layer_is_moved_again_when_the_run_resumes(config_path, tmp_path):
    """A run that went on in FP8 would differ from the first step on."""
    options = [
        *FP8,
        "precision.guard_action=bf16",
        "precision.guard_max_gap=1e-9",
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
    ]
    expected, _, _, moved = train(config_path, 2, options, guard_at=(3,))
    assert len(moved) == 1
    target = [*options, f"run.output_dir={tmp_path / 'run'}"]
    train(config_path, 2, target, guard_at=(3,), save_at=5)
    found, _, _, moved_again = train(config_path, 2, target)
    assert moved_again == moved
    assert found == expected[5:]


def test_blockwise_scales_under_sequence_parallelism(config_path):
    """Rounding as in `test_fused_layouts.py`, but scales of 128 values, where few outliers matter.

    The bounds are ten and four times what was measured, 3e-4 and 2.4e-3.
    """
    options = [
        "model.hidden_size=256",
        "model.ffn_hidden_size=256",
        "model.head_dim=64",
        "model.num_attention_heads=4",
        "model.num_query_groups=2",
        "model.num_layers=2",
        "data.sequence_length=64",
        "training.steps=3",
    ]
    expected, _, _, _ = train(
        config_path, 1, [*options, "model.backend=reference", "precision.mode=bf16"]
    )
    blockwise = [*options, *FP8, "precision.recipe=blockwise"]
    for layout in ([], ["parallel.tensor=2", "parallel.sequence=true"]):
        found, _, _, _ = train(config_path, 2 if layout else 1, [*blockwise, *layout])
        assert found != expected, "nothing was computed in FP8"
        for (loss, norm), (wanted, wanted_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(wanted, rel=3e-3)
            assert norm == pytest.approx(wanted_norm, rel=1e-2)
