"""SFT and DPO: every layout equals the single process; the reference is what it says it is.

Bounds as in `test_layouts.py`: only the order of fp32 sums may differ.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.distributed.test_layouts import LAYOUTS, assert_same
from tests.support.chats import chat_config, conversations, pairs, write_chat_shard
from tests.support.runs import train_and_save_rank, train_rank
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

# What is new here is the sum over an answer: on the last stage, over shards of the vocabulary, and
# over parts of the sequence.  TP2, PP2 and DP2 alone agree as well.
NAMES = ["TP2xPP2+SP", "CP2"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    found = {}
    for task, rows in (("sft", conversations(60)), ("dpo", pairs(60))):
        folder = tmp_path_factory.mktemp(task)
        shard = write_chat_shard(folder, task, rows)
        found[task] = folder / "run.yaml"
        found[task].write_text(yaml.safe_dump(chat_config(folder, task, shard)))
    return {task: str(path) for task, path in found.items()}


@pytest.fixture(scope="module")
def single(configs):
    reference = ["model.backend=reference"]
    return {
        task: run_distributed(train_rank, 1, path, reference)[0] for task, path in configs.items()
    }


@pytest.mark.parametrize("task", ["sft", "dpo"])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_equals_the_single_process(task, name, configs, single):
    world_size, overrides = LAYOUTS[name]
    options = ["model.backend=triton", *overrides.split()]
    histories = run_distributed(train_rank, world_size, configs[task], options)
    assert all(history == histories[0] for history in histories), "ranks disagree on the loss"
    assert_same(histories[0], single[task])


def test_a_frozen_reference_gives_the_same_run(configs, single):
    options = ["dpo.reference=frozen", "parallel.pipeline=2"]
    assert_same(run_distributed(train_rank, 2, configs["dpo"], options)[0], single["dpo"])


def test_a_resumed_run_finds_its_reference_again(configs, single, tmp_path):
    """The file is kept and read; where it is gone, it is made from the initial weights anew."""
    reference = next(Path(configs["dpo"]).parent.glob("*_reference"))
    (kept,) = reference.glob("*.npy")
    before = kept.stat()
    options = [f"run.output_dir={tmp_path / 'run'}"]
    run_distributed(train_and_save_rank, 1, configs["dpo"], options, 2)
    assert kept.stat().st_mtime_ns == before.st_mtime_ns, "computed again"
    values = np.load(kept)
    shutil.rmtree(reference)
    found = run_distributed(train_rank, 2, configs["dpo"], [*options, "parallel.pipeline=2"])[0]
    assert len(found) == 2
    assert_same(found, single["dpo"][2:])
    np.testing.assert_allclose(np.load(kept), values, rtol=1e-5)
