"""What a resumed run reads is what the uninterrupted run would have read, sample for sample.

The run stops in the middle of an epoch of both its corpora, and goes on with another data-parallel
size, another micro-batch and another split of the model.  The samples that the steps really took
are compared, not a loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.support.runs import config_tree, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

STEPS, STOP_STEP, GLOBAL = 8, 3, 8


def taken_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], stop_step: int
) -> tuple[int, list[list[list[list[int]]]]] | None:
    """Train to `stop_step`, save; the data-parallel rank, its ids by step, micro-batch, row."""
    from litespark.config import load_config
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.setup import set_up
    from litespark.training.step import train_step

    run = set_up(load_config(config_path, overrides))
    loader = run.train_batches
    if loader is None:  # a pipeline stage that sees no tokens
        while run.step < stop_step:
            train_step(run)
        Checkpointing().save_now(run)
        return None
    taken: list[list[list[list[int]]]] = []
    original = loader.next_step

    def next_step() -> Any:
        batches = original()
        taken.append([batch.tokens_bs.tolist() for batch in batches])
        return batches

    loader.next_step = next_step
    while run.step < stop_step:
        train_step(run)
    Checkpointing().save_now(run)
    loader.close()
    return loader._rank, taken


def train(world_size, config_path, overrides, stop_step):
    """Return the rows of each step in the order of the samples."""
    results = run_distributed(taken_rank, world_size, config_path, overrides, stop_step)
    by_rank: dict[int, Any] = {}
    for result in results:
        if result is not None:
            # Ranks that share the data-parallel rank (tensor, pipeline) read the same.
            assert by_rank.setdefault(result[0], result[1]) == result[1]
    ranks = [by_rank[rank] for rank in sorted(by_rank)]
    return [
        [row for batches in zip(*step, strict=True) for batch in batches for row in batch]
        for step in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tree = config_tree(folder, write_shard(folder / "a", documents=10))
    tree["data"]["blend"] = [
        {"prefix": str(folder / "a"), "weight": 2.0},
        {"prefix": write_shard(folder / "b", documents=5, seed=1), "weight": 1.0},
    ]
    tree["training"]["steps"] = STEPS
    tree["model"].update(num_layers=2, hidden_size=32, ffn_hidden_size=32, num_attention_heads=4)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture(scope="module")
def uninterrupted(config_path, tmp_path_factory):
    target = f"run.output_dir={tmp_path_factory.mktemp('whole')}"
    return train(1, config_path, [target, "batch.micro=4"], STEPS)


def test_the_run_stops_within_an_epoch_and_crosses_others(config_path, uninterrupted):
    from litespark.config import load_config
    from litespark.training.preflight import open_data

    blend, _ = open_data(load_config(config_path, []))
    for corpus, stopped, end in zip(
        blend.corpora,
        blend.samples_used(STOP_STEP * GLOBAL),
        blend.samples_used(STEPS * GLOBAL),
        strict=True,
    ):
        assert stopped % corpus.samples_per_epoch
        assert end > corpus.samples_per_epoch
    assert [[blend[s * GLOBAL + i][:-1].tolist() for i in range(GLOBAL)] for s in range(STEPS)] == (
        uninterrupted
    )


@pytest.mark.parametrize(
    ("saved_at", "resumed_at"),
    [
        ((1, "batch.micro=2"), (2, "batch.micro=1")),
        ((2, "batch.micro=4"), (4, "batch.micro=2 parallel.tensor=2")),
        ((4, "batch.micro=1"), (2, "batch.micro=4 parallel.pipeline=2")),
    ],
    ids=["DP1 to DP2", "DP2 to TP2xDP2", "DP4 to PP2"],
)
def test_resumed_run_reads_the_samples_of_the_whole_one(
    config_path, uninterrupted, tmp_path, saved_at, resumed_at
):
    assert resumed(config_path, tmp_path, saved_at, resumed_at) == uninterrupted


def resumed(config_path, folder, saved_at, resumed_at):
    """The rows of each step of a run that was stopped at one layout and went on at another."""
    target = f"run.output_dir={folder}"
    before = train(saved_at[0], config_path, [target, *saved_at[1].split()], STOP_STEP)
    after = train(resumed_at[0], config_path, [target, *resumed_at[1].split()], STEPS)
    assert (len(before), len(after)) == (STOP_STEP, STEPS - STOP_STEP)
    return before + after


def test_packed_documents_are_resumed_as_exactly(config_path, uninterrupted, tmp_path):
    """Under context parallelism, too, whose ranks all read whole samples."""
    packing = "data.packing=whole data.document_mask=true"
    overrides = [f"run.output_dir={tmp_path / 'whole'}", "batch.micro=4", *packing.split()]
    expected = train(1, config_path, overrides, STEPS)
    assert expected != uninterrupted
    layouts = ((2, f"batch.micro=2 {packing}"), (4, f"batch.micro=1 parallel.context=2 {packing}"))
    assert resumed(config_path, tmp_path / "stopped", *layouts) == expected
