"""The same code on a GPU: the CPU's checkpoint goes on there and has the CPU's losses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support import cli
from tests.support.runs import config_tree, write_shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def config(tmp_path) -> Path:
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["training"].update(save_every=5)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, output_dir: Path, *overrides: str, on_cpu: bool = False) -> str:
    environment = cli.environment() | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    done = subprocess.run(
        [
            *(sys.executable, "-m", "litespark", "train", str(config)),
            *(f"run.output_dir={output_dir}", *overrides),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cli.ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def records(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("overrides", [[], ["model.tie_embeddings=true", "model.vocab_size=121"]])
def test_a_cpu_checkpoint_goes_on_on_the_gpu(config, tmp_path, overrides):
    """fp32 on both (torch computes fp32 products without TF32 unless asked): the kernels sum in
    other orders, 2^-24 sqrt(n) a sum, and Adam drifts apart over 5 steps as between layouts."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(config, whole, *overrides, on_cpu=True)
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_000000010")
    output = train(config, part, *overrides)
    assert "resumed at step 5" in output
    for cpu, gpu in zip(records(whole), records(part), strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-5)


def test_bf16_run_is_measured(config, tmp_path):
    train(config, tmp_path / "run", "precision.mode=bf16", "training.steps=40")
    first, last = records(tmp_path / "run")[0], records(tmp_path / "run")[-1]
    assert last["loss"] < first["loss"] - 0.2
    assert last["tflops_per_gpu_causal"] > 0
    assert last["energy_joules"] is None or last["energy_joules"] >= 0
    if "H100" in torch.cuda.get_device_name() or "H200" in torch.cuda.get_device_name():
        assert 0 < last["mfu"] < 1


def test_resume_on_the_gpu_is_bit_exact(config, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(config, whole, "precision.mode=bf16")
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_000000010")
    train(config, part, "precision.mode=bf16")
    assert [r["loss"] for r in records(part)] == [r["loss"] for r in records(whole)]


@pytest.mark.parametrize("mode", ["bf16", "fp8"])
def test_a_recorded_step_changes_nothing(config, tmp_path, mode):
    """Evaluated and saved between replays, resumed, and the losses are the same to the last bit."""
    options = (f"precision.mode={mode}", "training.eval_every=5", "training.eval_steps=1")
    recorded = "training.cuda_graph=true"
    train(config, tmp_path / "eager", *options)
    train(config, tmp_path / "whole", *options, recorded)
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    shutil.rmtree(part / "checkpoints" / "step_000000010")
    assert "resumed at step 5" in train(config, part, *options, recorded)
    losses = [
        [record.get("loss", record.get("validation_loss")) for record in records(tmp_path / name)]
        for name in ("eager", "whole", "part")
    ]
    assert losses[0] == losses[1] == losses[2]


def test_cpu_patches_are_not_applied():
    code = (
        "import torch, json, megatron_patches as m\n"
        "before = torch.cuda.current_device\n"
        "names = m.apply_patches('cuda')\n"
        "assert torch.cuda.current_device is before\n"
        "print(json.dumps(names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cli.ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    applied = set(json.loads(done.stdout.splitlines()[-1]))
    cpu_only = {
        "current_device",
        "synchronize",
        "tensor_cuda",
        "cuda_literals",
        "type_names",
        "rng",
    }
    assert applied.isdisjoint(cpu_only | {"cp_rope", "streams", "keep_pipeline_outputs"})
    assert {"distopt_bucket_padding", "refuse_silent_faults"} <= applied


def test_export_and_generate(config, tmp_path):
    train(config, tmp_path / "run", "precision.mode=bf16")
    exported = cli.run("export", str(tmp_path / "run"), str(tmp_path / "hf"))
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()
