"""FP8 training on a GPU: the loss follows BF16's, and checkpoints move between the two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from litespark.ops import cublaslt
from litespark.ops.products import weight_gradient_added
from tests.support import cli
from tests.support.runs import config_tree, write_shard

STEPS = 30
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs FP8 tensor cores")
# Each option once beside the recipes' defaults.
FP8 = "precision.mode=fp8"
RUNS = {
    "bf16": ["precision.mode=bf16"],
    "delayed": [FP8, "precision.recipe=delayed"],
    "delayed, careful": [
        *(FP8, "precision.fc1_output=fp8_kept", "precision.fast_accumulation=forward"),
    ],
    "delayed, margin, BF16 ends": [
        *(FP8, "precision.margin=1"),
        *("precision.bf16_first_layers=1", "precision.bf16_last_layers=1"),
    ],
    "delayed, weights in FP8": [FP8, "precision.primary_weights=fp8"],
    "tensorwise": [FP8, "precision.recipe=tensorwise"],
    "tensorwise, weights in FP8": [
        *(FP8, "precision.recipe=tensorwise", "precision.primary_weights=fp8"),
    ],
    "tensorwise, recompute": [FP8, "precision.recipe=tensorwise", "training.recompute=full"],
    "blockwise": [FP8, "precision.recipe=blockwise"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A model whose every axis is a multiple of 128, as the blockwise recipe needs."""
    folder = tmp_path_factory.mktemp("fp8")
    tree = config_tree(folder, write_shard(folder / "tokens", documents=200))
    tree["model"].update(hidden_size=128, ffn_hidden_size=256, num_query_groups=8)
    tree["model"].update(vocab_padding_multiple=128, backend="triton")
    tree["data"]["sequence_length"] = 64
    tree["training"].update(steps=STEPS, save_every=15)
    tree["optimizer"]["lr"] = 1e-3
    # Without warm-up the first steps are chaotic: a rounding becomes 1 % of the loss at the fifth.
    tree["schedule"] = {"kind": "constant", "warmup_steps": 10}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def train(config: Path, output_dir: Path, *overrides: str) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "litespark", "train", str(config)),
            *(f"run.output_dir={output_dir}", *overrides),
        ],
        capture_output=True,
        text=True,
        env=cli.environment(),
        cwd=cli.ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def losses(output_dir: Path) -> list[float]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def resumed(config: Path, run: Path, folder: Path, name: str) -> list[float]:
    """A copy of a run goes on from its first checkpoint, as `name` trains; all its losses."""
    part = folder / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints" / f"step_{STEPS:09d}")
    assert "resumed at step 15" in train(config, part, *RUNS[name])
    return losses(part)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a whole run, by its name; trained when it is first asked for."""
    root = tmp_path_factory.mktemp("trained")

    def trained(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            train(config, folder, *RUNS[name])
        return folder

    return trained


@needs_fp8
@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_fp8_learns_as_bf16_does(name, trained):
    """E4M3 is off by up to 2^-4 of each operand, at random.  On a CPU, with torch's references of
    the same kernels, no recipe's loss is further off than 1.5e-3 at any step; 1e-2 leaves room for
    other roundings, and is below what a wrong scale or a stale weight does."""
    found, expected = losses(trained(name)), losses(trained("bf16"))
    assert len(found) == len(expected) == STEPS
    assert found != expected, "nothing was computed in FP8"
    assert found == pytest.approx(expected, rel=0.01)
    for history in (found, expected):
        assert history[-1] < history[0] - 0.3


@needs_fp8
@pytest.mark.parametrize(
    "recipe", ["delayed", "delayed, weights in FP8", "tensorwise", "blockwise"]
)
@pytest.mark.parametrize("to_fp8", [False, True], ids=["to BF16", "to FP8"])
def test_a_checkpoint_goes_on_in_the_other_precision(to_fp8, recipe, config, trained, tmp_path):
    """From step 15 on: what is stored, BF16 weights and fp32 masters, knows of no FP8."""
    first, second = ("bf16", recipe) if to_fp8 else (recipe, "bf16")
    found, expected = resumed(config, trained(first), tmp_path, second), losses(trained("bf16"))
    assert len(found) == STEPS
    assert found[:15] == losses(trained(first))[:15]
    assert found[15:] != losses(trained(first))[15:]
    assert found == pytest.approx(expected, rel=0.01)
    assert found[-1] < found[0] - 0.3


@needs_fp8
@pytest.mark.parametrize("name", ["delayed", "delayed, weights in FP8"])
def test_a_resumed_fp8_run_has_the_losses_of_an_uninterrupted_one(name, config, trained, tmp_path):
    """Bit for bit: the delayed scales' history, or that of weights, is part of the checkpoint."""
    assert resumed(config, trained(name), tmp_path, name) == losses(trained(name))


@needs_fp8
def test_the_guard_moves_layers_on_the_gpu(config, tmp_path):
    """A limit that no FP8 meets: a layer a comparison, and training goes on."""
    folder = tmp_path / "run"
    options = ["precision.guard_every=10", "precision.guard_action=bf16"]
    train(config, folder, FP8, *options, "precision.guard_max_gap=1e-12")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    details = [event["detail"] for event in events if event["event"] == "fp8_guard"]
    assert len(details) == 3
    assert all("continues in BF16" in detail for detail in details)
    assert len({detail.rpartition("; ")[2] for detail in details}) == 3
    history = losses(folder)
    assert history[-1] < history[0] - 0.3


@pytest.mark.parametrize("shape", [(37, 53, 71), (5, 3, 1), (130, 1, 7), (64, 33, 48)])
@pytest.mark.parametrize("with_cublaslt", [True, False])
def test_weight_gradients_of_odd_sizes_are_added(shape, with_cublaslt, monkeypatch):
    """torch's product, which reads and writes one matrix, where cuBLASLt is not or takes no such
    sizes.  Sums of small integers are exact."""
    if not with_cublaslt:
        monkeypatch.setattr(cublaslt, "is_available", lambda: False)
    m, n, k = shape
    torch.manual_seed(0)
    dy_mn, x_mk = (torch.randint(-2, 3, (m, size), device="cuda").bfloat16() for size in (n, k))
    out_nk = torch.randint(-50, 50, (n, k), device="cuda").float()
    expected = out_nk.double()
    for _ in range(3):  # micro-batches
        expected = expected + dy_mn.double().t() @ x_mk.double()
        weight_gradient_added(dy_mn, x_mk, out_nk)
    assert torch.equal(out_nk.double(), expected)
