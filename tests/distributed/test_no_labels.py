"""Batches of which no token counts: a loss of 0 and no gradient, not 0/0."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.runs import write_config, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

BACKENDS = {
    "reference": ["model.backend=reference"],
    "triton": ["model.backend=triton"],
    "fp8": ["model.backend=triton", "precision.mode=fp8"],
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("no_labels")
    return write_config(folder, write_shard(folder / "tokens"))


def masked_rank(rank, world_size, config_path, overrides, masked_steps):
    """Train 4 steps, of which some have no label; losses, norms, the validation loss of nothing."""
    from litespark.config import load_config
    from litespark.training.hooks.fp8_guard import Fp8Guard
    from litespark.training.setup import set_up
    from litespark.training.step import evaluate_samples, mean_loss, train_step

    run = set_up(load_config(config_path, overrides))
    forward_step = run.forward_step
    masked = True

    def masking(batches, model):
        def without_labels():
            for batch in batches:
                if batch is None:
                    yield None
                    continue
                mask_bs = batch.loss_mask_bs * (not masked)
                yield dataclasses.replace(batch, loss_mask_bs=mask_bs)

        return forward_step(without_labels(), model)

    run.forward_step = masking
    nothing = evaluate_samples(run, run.train_batches.samples if run.train_batches else None, 1)
    details = []
    run.record_event = lambda event, detail: details.append(detail)
    gap = Fp8Guard().compare(run) if run.config.precision.mode == "fp8" else 0.0
    history = []
    for number in range(4):
        masked = number in masked_steps
        outcome = train_step(run)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
    weights_are_finite = all(
        bool(torch.isfinite(parameter).all())
        for chunk in run.chunks
        for parameter in chunk.parameters()
    )
    run.close()
    return {"nothing": nothing, "gap": gap, "history": history, "finite": weights_are_finite}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["", "parallel.tensor=2", "parallel.pipeline=2"])
def test_a_batch_without_labels_has_loss_0_and_changes_no_later_one(backend, layout, config_path):
    """The first step among them, in which FP8's scales begin; then training goes on."""
    world_size = 2 if layout else 1
    options = [*BACKENDS[backend], *layout.split(), "optimizer.weight_decay=0"]
    found = run_distributed(masked_rank, world_size, config_path, options, {0, 2})
    for result in found:
        assert result["nothing"] == 0.0
        assert result["gap"] == 0.0
        assert result["finite"]
        (first, first_norm), (second, norm), (third, third_norm), (last, _) = result["history"]
        assert (first, first_norm) == (0.0, 0.0)
        assert (third, third_norm) == (0.0, 0.0)
        assert 4.0 < second < 5.5, "about ln 120"
        assert norm > 0.1
        assert 4.0 < last < 5.5
    assert found[0]["history"] == found[-1]["history"]
