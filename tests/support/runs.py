"""Small runs for tests: a configuration, a shard of learnable tokens, and one rank's training."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.support.spawn import run_distributed

VOCAB_SIZE = 120


def write_shard(
    prefix: Path, *, documents: int = 60, seed: int = 0, vocab: int = VOCAB_SIZE
) -> str:
    """Write a shard in which every second token follows from the one before; its prefix."""
    from litespark.data.indexed import IndexedWriter

    generator = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), vocab) as writer:
        for _ in range(documents):
            tokens = generator.integers(0, vocab, size=int(generator.integers(40, 200)))
            tokens[1::2] = (tokens[: len(tokens[1::2]) * 2 : 2] * 3 + 1) % vocab
            writer.add_document(tokens.tolist())
    return str(prefix)


def config_tree(folder: Path, shard: str) -> dict[str, Any]:
    """A run of 10 steps of a model whose every axis divides by 4."""
    return {
        "run": {"output_dir": str(folder / "run")},
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "vocab_size": VOCAB_SIZE,
            "max_sequence_length": 64,
        },
        "precision": {"mode": "fp32"},
        "data": {"blend": [{"prefix": shard}], "split": [90, 10, 0], "sequence_length": 32},
        "batch": {"global": 8, "micro": 2},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": 10},
        "logging": {"tensorboard": False},
    }


def write_config(folder: Path, shard: str) -> str:
    """`config_tree` as a file in the folder; its path."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree(folder, shard)))
    return str(path)


def train_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str]
) -> list[tuple[float, float]]:
    """Train as `litespark train` does, without hooks; the loss and gradient norm of each step."""
    from litespark.config import load_config
    from litespark.training.setup import set_up
    from litespark.training.step import mean_loss, train_step

    run = set_up(load_config(config_path, overrides))
    history = []
    while run.step < run.total_steps:
        outcome = train_step(run)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
    run.close()
    return history


@functools.cache
def train_alone(config_path: str, *overrides: str) -> list[tuple[float, float]]:
    """`train_rank` in one process, which layouts are held against; trained once, however often."""
    return run_distributed(train_rank, 1, config_path, list(overrides))[0]


def train_unreduced_norms_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str]
) -> list[tuple[float, float]]:
    """Train with norms that have lost the mark by which their gradients are summed over shards."""
    from litespark.models import build

    original = build.check_parameter_marks

    def unmark(chunk: Any, config: Any) -> None:
        for parameter in chunk.parameters():
            parameter.__dict__.pop("sequence_parallel", None)

    build.check_parameter_marks = unmark
    try:
        return train_rank(rank, world_size, config_path, overrides)
    finally:
        build.check_parameter_marks = original


def train_and_save_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], stop_step: int
) -> None:
    """Train `stop_step` steps of the run and save its state."""
    from litespark.config import load_config
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.setup import set_up
    from litespark.training.step import train_step

    run = set_up(load_config(config_path, overrides))
    while run.step < stop_step:
        train_step(run)
    Checkpointing().save_now(run)
    run.close()


def optimizer_groups_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], extra: dict[str, Any]
) -> list[dict[str, Any]]:
    """Resume with optimizer options that the checkpoint's writer did not have; the options after.

    `extra` is put into every group before the state is loaded, as another Adam would have it.
    """
    from litespark.checkpoint.load import load_checkpoint
    from litespark.checkpoint.optimizer_state import optimizer_step
    from litespark.config import load_config
    from litespark.training import setup

    original = setup.load_checkpoint

    def load(checkpoint: Path, chunks: Any, optimizer: Any) -> Any:
        for group in optimizer.param_groups:
            group.update(extra)
        return load_checkpoint(checkpoint, chunks, optimizer)

    setup.load_checkpoint = load
    try:
        run = setup.set_up(load_config(config_path, overrides))
    finally:
        setup.load_checkpoint = original
    run.close()
    assert optimizer_step(run.optimizer) == run.step
    groups = run.optimizer.param_groups
    return [{key: group[key] for key in group if key != "params"} for group in groups]
