"""Training that begins at a Hugging Face folder, and that writes such folders."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from litespark.checkpoint.hf.export import export_checkpoint
from litespark.checkpoint.hf.import_ import Importing, import_hf
from litespark.checkpoint.hf.registry import read_model
from litespark.checkpoint.initial_weights import check_initial_weights
from litespark.errors import UserError
from litespark.training.single import single_process
from tests.support import cli
from tests.support.hf_folder import write_hf_folder
from tests.support.runs import config_tree, write_shard
from tools import convert_from_hf, convert_to_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("made"), "qwen3", "head size 24")


def test_run_with_weights_from_hf_and_exports_along_the_way(folder, tmp_path):
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["model"] = read_model(folder).model_dump(mode="json")
    tree["run"]["init_from"] = str(folder)
    tree["training"] = {"steps": 4, "save_every": 2}
    tree["checkpoint"] = {"export_hf_every": 2, "keep_last": 1}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    result = cli.run("train", str(path), timeout_seconds=500)
    assert result.returncode == 0, result.stderr
    assert f"weights of {folder}; optimizer and schedule start anew" in result.stderr
    run = tmp_path / "run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "exported"] == [2, 4]
    assert sorted(path.name for path in (run / "hf").iterdir()) == [
        "step_000000002",
        "step_000000004",
    ]
    (last,) = (run / "checkpoints").glob("step_*")
    with single_process():
        export_checkpoint(last, tmp_path / "again")
    expected = load_file(tmp_path / "again/model.safetensors")
    found = load_file(run / "hf/step_000000004/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    start = load_file(folder / "model.safetensors")
    moved = [name for name in start if not torch.equal(start[name], found[name])]
    assert len(moved) == len(start), "training moves every tensor"
    assert all((start[name] - found[name]).abs().max() < 0.01 for name in start)

    # The second start goes on from the run's own checkpoint.
    again = cli.run("train", str(path), "training.steps=5", timeout_seconds=500)
    assert "resumed at step 4" in again.stderr


def test_another_model_is_named_key_by_key(folder, tmp_path):
    model = read_model(folder).model_copy(update={"num_layers": 3, "norm_epsilon": 1e-6})
    with pytest.raises(UserError, match=r"model.num_layers = 3: .* with 2") as found:
        check_initial_weights(str(folder), model)
    assert "model.norm_epsilon = 1e-06" in str(found.value)
    import_hf(folder, tmp_path / "in", Importing())
    with pytest.raises(UserError, match="was written with 2"):
        check_initial_weights(str(tmp_path / "in"), model)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        check_initial_weights(str(tmp_path), model)


def test_an_import_cannot_be_resumed_as_a_run(folder, tmp_path):
    import_hf(folder, tmp_path / "in", Importing())
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["model"] = read_model(folder).model_dump(mode="json")
    tree["run"]["resume"] = str(tmp_path / "in")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    result = cli.run("train", str(path), "--dry-run", timeout_seconds=500)
    assert result.returncode == 2
    assert "holds weights alone" in result.stderr
    assert "run.init_from=" in result.stderr


def test_tools_take_megatrons_flags(folder, tmp_path, monkeypatch, capsys):
    # fmt: off
    monkeypatch.setattr(sys, "argv", [
        "convert_from_hf.py", "--load", str(folder), "--save", str(tmp_path / "in"),
        "--loader", "llama_mistral", "--target-tensor-parallel-size", "8",
    ])
    assert convert_from_hf.main() == 0
    shown = capsys.readouterr().err
    assert "--target-tensor-parallel-size has no effect: the checkpoint holds whole" in shown
    assert "--loader has no effect" in shown
    monkeypatch.setattr(sys, "argv", [
        "convert_to_hf.py", "--load", str(tmp_path / "in"), "--save", str(tmp_path / "out"),
        "--tokenizer-model", str(folder), "--dtype", "bfloat16",
    ])
    # fmt: on
    assert convert_to_hf.main() == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    assert (
        load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype is torch.bfloat16
    )
