"""An exported folder: the same tensors whatever layout wrote the checkpoint, and what transformers
makes of it."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import stat
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from litespark.checkpoint.folder import find_checkpoint
from litespark.checkpoint.hf.export import Exporting, export_checkpoint
from litespark.checkpoint.hf.registry import config_json
from litespark.checkpoint.hf.shards import convert
from litespark.cli import export as command
from litespark.config.schema import RunConfig
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import LitesparkError, UserError
from litespark.models.build import build_chunks
from litespark.models.transformer_config import transformer_config
from litespark.training.single import load_model, single_process
from tests.integration.tiny import tiny_values, write_checkpoint, write_tokenizer
from tests.support.spawn import run_distributed

# name: changes of the shape, precision, the other layout, its number of processes
CASES = {
    "tp2_pp2": (
        {"vocab_size": 301, "vocab_padding_multiple": 64, "head_dim": 24},
        "fp32",
        {"tensor": 2, "pipeline": 2, "sequence": True},
        4,
    ),
    "pp2_vpp2_tied_bf16": (
        {"num_layers": 4, "tie_embeddings": True, "vocab_size": 301, "vocab_padding_multiple": 8},
        "bf16",
        {"pipeline": 2, "virtual_pipeline": 2},
        2,
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each case the run's configuration and the folders that one process and several wrote."""
    made = {}
    for name, (shape, precision, layout, world_size) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        tokenizer = write_tokenizer(folder / "tokenizer")
        values = tiny_values(str(folder / "one"), precision=precision, **shape)
        values["data"]["tokenizer"] = str(tokenizer.parent)
        run_distributed(write_checkpoint, 1, values)
        many = {**values, "run": {"output_dir": str(folder / "many")}, "parallel": layout}
        run_distributed(write_checkpoint, world_size, many)
        made[name] = (RunConfig.model_validate(values), folder / "one", folder / "many")
    return made


@pytest.fixture
def tiny_run(runs):
    return runs["tp2_pp2"][1]


def export(run, out, **options):
    with single_process():
        return export_checkpoint(find_checkpoint(run), out, Exporting(**options))


def tensors_in(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_layouts_export_identical_tensors(runs, case, tmp_path):
    config, one, many = runs[case]
    exported = export(one, tmp_path / "one")
    export(many, tmp_path / "many")
    expected, found = tensors_in(tmp_path / "one"), tensors_in(tmp_path / "many")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype is getattr(torch, exported.dtype_name)
        assert torch.equal(found[name], value), name
    assert exported.num_parameters == sum(value.numel() for value in expected.values())
    assert len(expected["model.embed_tokens.weight"]) == config.model.vocab_size
    assert ("lm_head.weight" in expected) != config.model.tie_embeddings


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_same_logits(runs, case, tmp_path):
    """Both sides compute in fp32 with unit roundoff u and sum in another order.

    Each of the 5 matrix products a layer, and the LM head, sums at most k = 96 terms, with a
    relative error of about sqrt(k) u for random signs.  Two sides of 5 L + 1 products differ by at
    most their sum, relative to the largest logit; for 4 layers 2 * 21 * sqrt(96) * u = 2.5e-5.
    """
    config, one, _ = runs[case]
    exported = tmp_path / "hf"
    export(one, exported, dtype="float32")
    tokens_bs = torch.randint(config.model.vocab_size, (2, 40), generator=torch.manual_seed(5))
    twin, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    assert twin.dtype is torch.float32
    with single_process(), torch.no_grad():
        model, _ = load_model(find_checkpoint(one))
        # fp32 arithmetic also for weights stored in bf16: conversion to fp32 is exact.
        if config.precision.mode == "bf16":
            values = config.model_dump(mode="json", by_alias=True)
            values["precision"]["mode"] = "fp32"
            model = _in_fp32(RunConfig.model_validate(values), model)
        positions_bs = torch.arange(40).expand(2, -1)
        logits_bsv = model.mask_padding(model(tokens_bs, positions_bs, None))
        expected_bsv = twin(tokens_bs).logits
    bound = 2 * (5 * config.model.num_layers + 1) * 96**0.5 * 2**-24
    logits_bsv = logits_bsv[..., : config.model.vocab_size]
    difference = float((logits_bsv - expected_bsv).abs().max() / expected_bsv.abs().max())
    assert expected_bsv.std() > 0.1, "the logits must say something"
    print(f"largest difference of logits {difference:.1e}, bound {bound:.1e}")
    assert difference < bound


def _in_fp32(config, model):
    (twin,) = build_chunks(config, transformer_config(config))
    weights = {k: v for k, v in model.state_dict().items() if v is not None}
    twin.load_state_dict(weights, strict=False)
    return twin.eval()


def test_large_models_are_split_into_files_with_an_index(tiny_run, tmp_path):
    export(tiny_run, tmp_path / "whole")
    exported = export(tiny_run, tmp_path / "split", max_shard_bytes=100_000)
    count = len(exported.weight_files)
    assert count > 2
    assert exported.weight_files[0] == f"model-00001-of-{count:05d}.safetensors"
    index = json.loads((tmp_path / "split/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == exported.num_bytes
    for file in exported.weight_files:
        held = load_file(tmp_path / "split" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 100_000
    whole = load_file(tmp_path / "whole/model.safetensors")
    split = AutoModelForCausalLM.from_pretrained(tmp_path / "split").state_dict()
    assert all(torch.equal(split[name], value) for name, value in whole.items())


def test_dtype_is_converted_and_an_overflow_refused(runs, tmp_path):
    _, one, _ = runs["pp2_vpp2_tied_bf16"]
    export(one, tmp_path / "bf16")
    exported = export(one, tmp_path / "fp16", dtype="float16")
    assert exported.dtype_name == "float16"
    stored, converted = tensors_in(tmp_path / "bf16"), tensors_in(tmp_path / "fp16")
    assert all(torch.equal(converted[name], value.half()) for name, value in stored.items())
    config = json.loads((tmp_path / "fp16/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    with pytest.raises(UserError, match="Give one of float32, bfloat16, float16"):
        export(one, tmp_path / "int8", dtype="int8")

    with pytest.raises(UserError, match="holds 70000, and float16 ends at 65504"):
        convert("w", torch.tensor([1.0, -70000.0]), torch.float16)
    assert convert("w", torch.tensor([float("inf")]), torch.float16).isinf()


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_tokenizer_goes_along_and_splits_text_alike(tiny_run, tmp_path, kind):
    """Bare model files, under names of their own: what transformers needs beside is written."""
    path = tmp_path / ("bpe.json" if kind == "json" else "bpe.model")
    if kind == "json":
        write_tokenizer(tmp_path).rename(path)
    else:
        path.write_bytes(train_sentencepiece())
    export(tiny_run, tmp_path / "hf", tokenizer=str(path))
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path / "hf")
    # Not a text that begins with a space: for sentencepiece models transformers swallows one.
    for text in ("the cat and the hat", "The cat,  and the dög:\n 12345 of"):
        assert theirs.encode(text) == ours.encode(text), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.bos_id, ours.eos_id)
    assert ours.eos_id is not None


def train_sentencepiece():
    """A model with the settings of Llama 2's."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the dog and the hat of the cat"] * 50),
        model_writer=content,
        model_type="bpe",
        vocab_size=285,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return content.getvalue()


def test_companions_of_a_tokenizer_are_copied_as_they_are(tiny_run, tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer").parent
    written = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "x": 1}'
    (folder / "tokenizer_config.json").write_text(written)
    export(tiny_run, tmp_path / "hf", tokenizer=str(folder))
    for file in folder.iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()


def test_missing_tokenizer_of_the_run_is_a_warning_a_named_one_an_error(tiny_run, tmp_path, caplog):
    tokenizer = tiny_run.parent / "tokenizer"
    moved = tokenizer.rename(tmp_path / "moved")
    try:
        exported = export(tiny_run, tmp_path / "without")
        assert not exported.has_tokenizer
        assert "is not there (seen from" in caplog.text
        assert not (tmp_path / "without/tokenizer.json").exists()
        assert export(tiny_run, tmp_path / "with", tokenizer=str(moved)).has_tokenizer
        with pytest.raises(UserError, match="no such file or folder"):
            export(tiny_run, tmp_path / "named", tokenizer=str(tokenizer))
    finally:
        moved.rename(tokenizer)


def test_refuses_what_is_no_checkpoint_and_what_would_be_overwritten(tiny_run, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        export(tmp_path, tmp_path / "hf")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(tiny_run, taken)
    with pytest.raises(UserError, match="is a file"):
        export(tiny_run, taken / "notes.txt")
    assert (taken / "notes.txt").read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    export(tiny_run, empty)
    assert (empty / "model.safetensors").is_file()


@pytest.mark.parametrize("damage", ["index", "values", "cut", "shape", "garbage"])
def test_damaged_checkpoint_is_one_message_and_leaves_nothing(tiny_run, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoint = find_checkpoint(run)
    pieces = list((checkpoint / "state").glob("*.distcp"))
    if damage == "index":
        (checkpoint / "state/.metadata").unlink()
    elif damage == "garbage":
        (checkpoint / "state/.metadata").write_bytes(b"not an index")
    elif damage == "values":
        for piece in pieces:
            piece.unlink()
    elif damage == "cut":
        for piece in pieces:
            piece.write_bytes(piece.read_bytes()[:3000])
    else:
        state = json.loads((checkpoint / "run_state.json").read_text())
        state["model"]["ffn_hidden_size"] = 80
        (checkpoint / "run_state.json").write_text(json.dumps(state))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="state"):
        export(run, out / "hf")
    assert list(out.iterdir()) == []


def test_nothing_is_left_when_the_disk_fills(tiny_run, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("litespark.checkpoint.hf.shards.HashingFile.write", full)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LitesparkError, match=r"nothing was kept .*No space left"):
        export(tiny_run, out / "hf")
    assert list(out.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_a_mistake(tiny_run, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "hf", Path("/proc/hf")):
        with pytest.raises(UserError, match="cannot be made"):
            export(tiny_run, out)


def test_both_generations_of_transformers_read_the_rotary_frequencies():
    scaling = {"factor": 8.0, "original_max_sequence_length": 32}
    values = tiny_values("unused", rope_theta=5e5, rope_scaling=scaling)
    written = config_json(RunConfig.model_validate(values).model, "bfloat16", None, 2)
    new_words = {"rope_parameters", "dtype"}
    old_words = {"rope_theta", "rope_scaling", "torch_dtype"}
    read = [
        LlamaConfig.from_dict({k: v for k, v in written.items() if k not in left_out})
        for left_out in (set(), new_words, old_words)
    ]
    for config in read:
        assert config.rope_parameters == {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        assert config.dtype in (torch.bfloat16, "bfloat16")
        assert config.head_dim == 16


def test_command(tiny_run, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    for number, path in enumerate([tiny_run, tiny_run / "checkpoints", find_checkpoint(tiny_run)]):
        out = tmp_path / f"hf{number}"
        args = parser.parse_args(["export", str(path), str(out), "--dtype", "bfloat16"])
        assert args.run(args) == 0
        assert f"wrote {out}" in capsys.readouterr().out
        assert tensors_in(out)["model.norm.weight"].dtype is torch.bfloat16
    card = (out / "README.md").read_text()
    assert "| optimizer steps | 7 |" in card
    assert "| training tokens | 896 |" in card
    # Others may read the weights wherever they may read the rest.
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
    assert len(modes) == 1


def test_refuses_to_run_in_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE = 2: this command runs in one process"):
        single_process().__enter__()
