"""Training learns: it over-fits one batch, decays what it should, and notices NaN."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from litespark.data.indexed import IndexedWriter
from tests.support.runs import VOCAB_SIZE, config_tree, train_rank, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed


@pytest.fixture
def write_config(tmp_path):
    def write(shard: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config_tree(tmp_path, shard)))
        return str(path)

    return write


def test_overfits_one_batch(tmp_path, write_config):
    """Eight samples of random tokens, all of them in every step: only memory can lower the loss."""
    length, samples = 32, 8
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, size=length * samples + 1)
    with IndexedWriter(str(tmp_path / "one_batch"), VOCAB_SIZE) as writer:
        writer.add_document(tokens.tolist())
    config = write_config(str(tmp_path / "one_batch"))
    options = ["training.steps=150", "data.split=[1,0,0]", "optimizer.lr=1e-2", "batch.micro=8"]
    losses = [loss for loss, _ in run_distributed(train_rank, 1, config, options)[0]]
    assert losses[0] > np.log(VOCAB_SIZE) - 0.5, "random tokens cannot be guessed at first"
    assert losses[-1] < 0.1


def parameter_groups_rank(rank, world_size, config_path):
    from litespark.config import load_config
    from litespark.training.setup import set_up
    from litespark.training.step import set_learning_rate

    run = set_up(load_config(config_path, ["parallel.distributed_optimizer=false"]))
    set_learning_rate(run, 0.5)
    run.train_batches.close()
    return [
        (group["lr"], group["weight_decay"], sorted({param.dim() for param in group["params"]}))
        for group in run.optimizer.param_groups
    ]


def test_norms_are_not_decayed(tmp_path, write_config):
    config = write_config(write_shard(tmp_path / "tokens"))
    groups = run_distributed(parameter_groups_rank, 1, config)[0]
    assert sorted(groups) == [(0.5, 0.0, [1]), (0.5, 0.1, [2])]


def initial_weights_rank(rank, world_size, config_path, overrides):
    from litespark.checkpoint.sharded import bare_model
    from litespark.config import load_config
    from litespark.training.setup import set_up

    run = set_up(load_config(config_path, overrides))
    run.train_batches.close()
    weights = bare_model(run.chunks[0]).state_dict()
    return {name: value.numpy() for name, value in weights.items() if value is not None}


def test_initial_weights_have_their_spread_and_follow_the_seed(tmp_path, write_config):
    config = write_config(write_shard(tmp_path / "tokens"))
    weights = run_distributed(initial_weights_rank, 1, config, [])[0]
    again = run_distributed(initial_weights_rank, 1, config, [])[0]
    other = run_distributed(initial_weights_rank, 1, config, ["seed=1"])[0]
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert np.array_equal(weights[name], again[name])
    assert not np.array_equal(weights[name], other[name])
    assert weights[name].std() == pytest.approx(0.02, rel=0.03)
    into_residual = weights["decoder.layers.3.mlp.linear_fc2.weight"].std()
    assert into_residual == pytest.approx(0.02 / np.sqrt(2 * 4), rel=0.03)
    assert not np.array_equal(weights[name], weights[name.replace("layers.0", "layers.1")])
    assert (weights["decoder.final_layernorm.weight"] == 1).all()
