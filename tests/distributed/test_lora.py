"""Low-rank adapters: every layout equals the single process, the base stays, a run resumes."""

from __future__ import annotations

import pytest
import yaml

from tests.distributed.test_layouts import LAYOUTS, assert_same
from tests.support.chats import chat_config, conversations, write_chat_shard
from tests.support.runs import train_and_save_rank, train_rank
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

# A large step: the adapters must matter before the base could.
LORA = ["lora.rank=4", "lora.alpha=16", "optimizer.lr=0.01"]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    shard = write_chat_shard(folder, "sft", conversations(60))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(chat_config(folder, "sft", shard)))
    return str(path)


def trained_rank(rank, world_size, config_path, overrides):
    """The history of a run, and how far each parameter has moved."""
    import torch

    from litespark.checkpoint.sharded import bare_model
    from litespark.config import load_config
    from litespark.training.setup import set_up
    from litespark.training.step import mean_loss, train_step

    run = set_up(load_config(config_path, overrides))
    before = {
        name: parameter.detach().clone()
        for chunk in run.chunks
        for name, parameter in bare_model(chunk).named_parameters()
    }
    history = []
    while run.step < run.total_steps:
        outcome = train_step(run)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
    run.close()
    moved = {
        name: float((parameter.detach() - before[name]).abs().max())
        for chunk in run.chunks
        for name, parameter in bare_model(chunk).named_parameters()
    }
    assert all(isinstance(value, torch.Tensor) for value in before.values())
    return history, moved


@pytest.fixture(scope="module")
def single(config_path):
    return run_distributed(trained_rank, 1, config_path, [*LORA, "model.backend=reference"])[0]


def test_adapters_learn_and_nothing_else_moves(single):
    history, moved = single
    assert history[-1][0] < history[0][0]
    adapters = {name: value for name, value in moved.items() if ".adapter." in name}
    assert len(adapters) == 2 * 4 * 2  # layers, targets, matrices
    assert min(adapters.values()) > 0
    assert not any(value for name, value in moved.items() if ".adapter." not in name)


@pytest.mark.parametrize(
    ("backend", "name"),
    [("triton", "TP2xPP2+SP"), ("triton", "TP2+SP full recompute"), ("reference", "TP2")],
)
def test_every_layout_equals_the_single_process(backend, name, config_path, single):
    world_size, overrides = LAYOUTS[name]
    options = [*LORA, f"model.backend={backend}", *overrides.split()]
    histories = run_distributed(train_rank, world_size, config_path, options)
    assert all(history == histories[0] for history in histories)
    assert_same(histories[0], single[0])


def test_resume_at_another_layout(config_path, single, tmp_path):
    target = [*LORA, f"run.output_dir={tmp_path / 'run'}", "model.backend=triton"]
    saved_at = ["parallel.tensor=2"]
    run_distributed(train_and_save_rank, 2, config_path, [*target, *saved_at], 2)
    found = run_distributed(train_rank, 2, config_path, [*target, "parallel.pipeline=2"])[0]
    assert len(found) == 2
    assert_same(found, single[0][2:])
