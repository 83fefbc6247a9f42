"""`litespark bench` as a user runs it, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import cli
from tests.support.runs import config_tree, write_shard

pytestmark = pytest.mark.distributed

SMALL = ["--model", "tiny", "--backend", "reference", "--seq-length", "64", "--warmup", "1"]


def measure(out: Path, *words: str) -> dict:
    done = cli.run("bench", *SMALL, "--json", str(out), *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a measurement has nothing to say but its figures"
    assert "tokens/s" in done.stdout
    return json.loads(out.read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_measured(tmp_path, precision):
    words = ["--precision", precision, "--micro-batch", "2", "--accumulate", "2", "--steps", "3"]
    result = measure(tmp_path / "out.json", *words)
    assert result["precision"]["mode"] == precision
    assert result["n"] == 3
    assert result["tokens_per_step"] == 2 * 2 * 64
    seconds = result["step_seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert result["tokens_per_second"] == pytest.approx(256 / seconds["median"])
    # An untrained model of 2048 tokens: ln 2048 = 7.62, after four steps on the same batch less.
    assert 6.5 < result["loss"] < 7.7
    assert result["first_step_seconds"] > seconds["min"] / 2
    assert result["start_to_first_step_seconds"] > result["first_step_seconds"]
    assert result["modules"]["self_attention.core_attention"]
    assert result["versions"]["megatron-core"]
    for key in ("mfu", "tflops_per_gpu_causal", "joules_per_1000_tokens", "breakdown"):
        assert result[key] is None, "a CPU has none"


def test_it_is_the_step_of_a_training_run(tmp_path):
    """With the same data, seed and options, the loss is that of `litespark train`, bit for bit."""
    shard = write_shard(tmp_path / "tokens")
    words = ["--precision", "fp32", "--micro-batch", "2", "--accumulate", "4", "--steps", "3"]
    result = measure(tmp_path / "out.json", *words, "--data", shard)
    tree = config_tree(tmp_path, shard)
    tree |= {"model": {"preset": "tiny", "backend": "reference"}, "optimizer": {"lr": 1e-4}}
    tree["data"] |= {"split": [100, 0, 0], "sequence_length": 64}
    tree |= {"schedule": {"kind": "constant"}, "training": {"steps": 4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = cli.run("train", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["loss"] == result["loss"]


def test_several_ranks_are_measured_together(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node",
        "2",
        "-m",
        "litespark",
        "bench",
        *SMALL,
        "--json",
        str(out),
        "--steps",
        "2",
    ]
    command += ["--precision", "fp32", "--accumulate", "2", "parallel.tensor=2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=cli.environment(),
        cwd=cli.ROOT,
        timeout=cli.PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s  ") == 1, "the first rank speaks"
    result = json.loads(out.read_text())
    assert result["gpus"] == 2
    assert result["parallel"] == "TP2 x CP1 x DP1 x PP1"
    assert result["tokens_per_step"] == 4 * 2 * 64


def test_mistakes_end_with_exit_code_2():
    done = cli.run("bench", "--model", "tiny", "--data", "/no/such/shard")
    assert done.returncode == 2
    assert "/no/such/shard" in done.stderr
    assert done.stdout == ""
