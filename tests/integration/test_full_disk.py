"""A disk that fills up during a run: training goes on, the user is told, old states stay."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support import cli
from tests.support.runs import config_tree, write_shard

pytestmark = pytest.mark.distributed


@pytest.fixture
def config(tmp_path) -> Path:
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["training"].update(steps=8, save_every=2, log_every=1)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 5 MB, where this user may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system; test_train_cli limits file sizes")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_file_system(asynchronous, config, small_disk):
    """Each checkpoint has 1.9 MB: the third does not fit."""
    run_dir = small_disk / "run"
    options = [f"run.output_dir={run_dir}", f"checkpoint.asynchronous={asynchronous}"]
    ended = cli.run("train", str(config), "--nproc", "2", *options)
    full = "OSError: [Errno 28] No space left on device"
    assert f"the state of step 6 could not be saved ({full}); training goes on" in ended.stderr
    # The last save has to succeed, and did not.
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last == f"litespark: error: step 8 could not be saved: {full}"
    assert "Traceback" not in ended.stderr
    assert "the state of step 8" not in ended.stderr, "training does not go on"
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["latest", "step_000000002", "step_000000004"], "nothing half-written"
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps == list(range(1, 9)), "training went on"
    # Room is made, and the run goes on from what was saved.
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    ended = cli.run("train", str(config), "--nproc", "2", *options)
    assert ended.returncode == 0, ended.stderr
    assert "resumed at step 4" in ended.stderr
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_000000008\n"
