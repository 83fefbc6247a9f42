"""The benchmark of checkpoints, on a tiny model: every part runs, and nothing in it is made up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import cli

pytestmark = pytest.mark.distributed


def test_all_parts(tmp_path):
    options = ["--model", "tiny", "--seq-length", "32", "--micro-batch", "1", "--accumulate", "1"]
    options += ["--steps", "2", "--warmup", "1", "--disk-gigabytes", "0.02"]
    options += ["--budget-seconds", "10000"]
    options += ["--folder", str(tmp_path), "--json", str(tmp_path / "result.json")]
    command = [sys.executable, "tools/benchmarks/checkpoint.py", *options, "model.num_layers=1"]
    environment = cli.environment() | {"PYTHONPATH": str(cli.ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command,
        cwd=cli.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=cli.PATIENCE_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    first, second, load = (result[part] for part in ("first_save", "second_save", "load"))
    assert first["gigabytes"] == second["gigabytes"] > 0
    assert second["call_seconds"] > second["copy_seconds"] > 0
    assert load["loss_of_next_step_after_load"] == load["loss_of_next_step_after_save"]
    assert result["disk"]["write_gb_per_second_1"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "it leaves files behind"
