"""Runs with a mirror: gone on with on another machine, and with a store that is gone."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml

from tests.support.runs import config_tree, write_shard
from tests.support.spawn import run_distributed
from tests.support.store import empty_bucket, running_store

pytestmark = pytest.mark.distributed

pytest.importorskip("s3fs", reason="the extra 's3' is not installed")
pytest.importorskip("moto.server", reason="moto is not installed")

PLACE = "s3://shelf/run"


@pytest.fixture
def store():
    with running_store() as address:
        yield empty_bucket(address, "s3://shelf")


def run_rank(rank, world_size, config_path, overrides, environment):
    """What `litespark train` does in a rank; the error it ends with, or nothing."""
    os.environ.update(environment)
    from litespark.config import load_config
    from litespark.errors import LitesparkError
    from litespark.training.run import run_training

    try:
        run_training(load_config(config_path, overrides))
    except LitesparkError as error:
        return str(error)
    return ""


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").open()]


def test_a_run_goes_on_from_the_store_and_without_it(store, tmp_path):
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["training"].update(steps=6, save_every=2, log_every=1)
    tree["schedule"] = {"kind": "constant"}
    tree["checkpoint"] = {"keep_last": 1, "mirror": PLACE}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    folder, whole = tmp_path / "run", tmp_path / "whole"
    address = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}

    def train(*overrides, **variables):
        path = str(tmp_path / "run.yaml")
        return run_distributed(run_rank, 2, path, list(overrides), address | variables)

    # Nobody listens there, and nobody waits for it to come back.
    gone = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    assert train(f"run.output_dir={whole}", "checkpoint.mirror=null") == ["", ""]
    assert train("training.steps=2") == ["", ""]
    sent = [event["detail"] for event in events(folder) if event["event"] == "mirrored"]
    assert sent == [f"{PLACE}/step_000000002"]

    # Another machine, whose disk is empty.
    shutil.move(folder, tmp_path / "first")
    assert train("training.steps=4") == ["", ""]
    assert events(folder)[0]["event"] == "resumed"
    assert events(folder)[0]["detail"].endswith("from step_000000002")

    # The store does not answer any more: training goes on, and at the end that is an error.
    first, second = train(**gone)
    assert first == second
    assert first.startswith(f"step 6 is saved in {folder}, but could not be sent to {PLACE}/step_")
    assert "mirror_failed" in [event["event"] for event in events(folder)]
    found = losses(tmp_path / "first") | losses(folder)
    assert found == losses(whole), "not the losses of a run that was left alone"

    # It is back: there is nothing to train, but something to send.
    assert train() == ["", ""]
    assert {name.split("/")[2] for name in store.find(PLACE)} == {"latest", "step_000000006"}
    # And a store that holds nothing that can be read, when there is nothing here, is a mistake.
    shutil.move(folder, tmp_path / "second")
    first, second = train(**gone)
    assert first == second
    assert first.startswith(f"{PLACE}: cannot be read")
