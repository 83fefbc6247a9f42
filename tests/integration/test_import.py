"""Hugging Face folders in: bit for bit, after a kill too, proven, and hostile ones named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litespark.checkpoint.folder import find_checkpoint
from litespark.checkpoint.hf import shards, state_writer
from litespark.checkpoint.hf.export import Exporting, export_checkpoint
from litespark.checkpoint.hf.import_ import Importing, import_hf
from litespark.checkpoint.hf.verify import verify
from litespark.checkpoint.integrity import check_whole
from litespark.checkpoint.run_state import RunState
from litespark.cli.main import main
from litespark.errors import LitesparkError, UserError
from litespark.training.single import single_process
from litespark.utils.files import sha256_of_file
from tests.support.hf_folder import (
    CHAT_TEMPLATE,
    GENERATION,
    change_config,
    change_header,
    write_hf_folder,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "source"))


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------------------------- there, back


def test_import_and_export_give_back_all_files(made, tmp_path):
    imported = import_hf(made, tmp_path / "in", Importing())
    check_whole(imported.checkpoint)
    state = RunState.read(imported.checkpoint)
    assert state.weights_only
    assert state.step == 0
    with single_process():
        exported = export_checkpoint(imported.checkpoint, tmp_path / "out")
    assert exported.architecture == "LlamaForCausalLM"
    one, other = (
        load_file(made / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == GENERATION
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == GENERATION["eos_token_id"]
    # And in again: the same checkpoint, byte for byte, but for the names of its origins.
    again = import_hf(tmp_path / "out", tmp_path / "again", Importing())
    assert content(again.checkpoint / "state") == content(imported.checkpoint / "state")
    assert RunState.read(again.checkpoint) == state

    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "the cat"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "the cat"
    assert CHAT_TEMPLATE in (tmp_path / "out/chat_template.jinja").read_text()


def test_manifest_lists_every_file(made, tmp_path):
    imported = import_hf(made, tmp_path / "in", Importing())
    with single_process():
        export_checkpoint(imported.checkpoint, tmp_path / "out", Exporting(dtype="bfloat16"))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert set(manifest["files"]) | {"manifest.json"} == set(os.listdir(tmp_path / "out"))
    for name, record in manifest["files"].items():
        assert record["sha256"] == sha256_of_file(tmp_path / "out" / name)
        assert record["size_bytes"] == (tmp_path / "out" / name).stat().st_size


class Killed(BaseException):
    """What ends the process at some point."""


def killed_after(monkeypatch, target, name, count):
    original, calls = getattr(target, name), []

    def write(*args):
        calls.append(1)
        if len(calls) > count:
            raise Killed
        return original(*args)

    monkeypatch.setattr(target, name, write)


def test_a_killed_import_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(state_writer, "MAX_FILE_BYTES", 20_000)
    (tmp_path / "whole.partial").mkdir()  # of one killed before anything was complete
    import_hf(made, tmp_path / "whole", Importing())
    with monkeypatch.context() as patch:
        killed_after(patch, state_writer, "_write_file", 3)
        with pytest.raises(Killed):
            import_hf(made, tmp_path / "in", Importing())
    assert not (tmp_path / "in").exists()
    with pytest.raises(UserError, match=r"cut short.*--resume"):
        import_hf(made, tmp_path / "in", Importing())
    with pytest.raises(UserError, match="another task: dtype differs"):
        import_hf(made, tmp_path / "in", Importing(dtype="bfloat16", resume=True))
    kept = tmp_path / "in.partial/step_000000000/state/__0_1.distcp"
    before = kept.stat().st_mtime_ns
    import_hf(made, tmp_path / "in", Importing(resume=True))
    assert content(tmp_path / "in") == content(tmp_path / "whole")
    assert (
        tmp_path / "in" / kept.relative_to(tmp_path / "in.partial")
    ).stat().st_mtime_ns == before
    check_whole(find_checkpoint(tmp_path / "in"))


def test_a_killed_export_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    checkpoint = import_hf(made, tmp_path / "in", Importing()).checkpoint
    small = {"max_shard_bytes": 20_000}
    with single_process():
        export_checkpoint(checkpoint, tmp_path / "whole", Exporting(**small))
        with monkeypatch.context() as patch:
            killed_after(patch, shards, "_header", 3)
            with pytest.raises(Killed):
                export_checkpoint(checkpoint, tmp_path / "out", Exporting(**small))
        assert not (tmp_path / "out").exists()
        export_checkpoint(checkpoint, tmp_path / "out", Exporting(resume=True, **small))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_half_precision_sources(made, tmp_path):
    weights = load_file(made / "model.safetensors")
    for dtype, kept in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
        source = Path(shutil.copytree(made, tmp_path / kept))
        values = {name: value.to(dtype) for name, value in weights.items()}
        save_file(values, source / "model.safetensors")
        imported = import_hf(source, tmp_path / f"{kept}-in", Importing())
        assert imported.dtype_name == kept
        with single_process():
            export_checkpoint(imported.checkpoint, tmp_path / f"{kept}-out")
            result = verify(imported.checkpoint, tmp_path / f"{kept}-out", tmp_path)
        assert result.weights == kept
        found = load_file(tmp_path / f"{kept}-out/model.safetensors")
        assert all(
            torch.equal(found[name], value.to(found[name].dtype)) for name, value in values.items()
        )


# ------------------------------------------------------------------------------------------- proof


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_verify_finds_the_same_model_and_another_one(folder, tmp_path, layer_by_layer):
    checkpoint = import_hf(folder, tmp_path / "in", Importing()).checkpoint
    with single_process():
        result = verify(checkpoint, folder, tmp_path, layer_by_layer=layer_by_layer)
        assert result.passed
        assert result.num_tokens == 64
        assert result.loss_litespark > 0.5
        written = json.loads((tmp_path / "verification.json").read_text())
        assert written["logits_difference"] == result.logits_difference
        # One weight of the first layer, changed by a thousandth.
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.self_attn.k_proj.weight"][3] *= 1.001
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LitesparkError, match="NOT THE SAME MODEL"):
            verify(checkpoint, folder, tmp_path, layer_by_layer=layer_by_layer)
    assert not json.loads((tmp_path / "verification.json").read_text())["passed"]


def test_commands(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog and the hat " * 40)
    verified = ["--verify", "--verify-text", str(text)]
    assert main(["import", str(folder), str(tmp_path / "in"), *verified]) == 0
    assert "same model" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out"), *verified]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM" in shown
    assert f"tokens of {text}, weights in float32" in shown
    assert (tmp_path / "out/verification.json").is_file()
    # fmt: off
    assert main(["generate", str(tmp_path / "in"), "--prompt", "the cat",
                 "--max-new-tokens", "3"]) == 0
    # fmt: on
    assert main(["import", str(folder), str(tmp_path / "in")]) == 2
    assert "is not empty" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- hostile


def refused(folder, tmp_path, match):
    """The import is refused in one message, and leaves nothing."""
    with pytest.raises(UserError, match=match):
        import_hf(folder, tmp_path / "in", Importing())
    assert not list(tmp_path.glob("in*"))


def test_missing_unexpected_and_misshapen_tensors_are_all_named(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)
    weights["model.norm.weight"] = torch.ones(65)
    save_file(weights, folder / "model.safetensors")
    refused(
        folder,
        tmp_path,
        r"lacks model.layers.1.mlp.up_proj.weight; it has unexpected "
        r"model.layers.1.self_attn.q_proj.bias; it has of another shape model.norm.weight \(65,\)",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures = .*is not supported"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"}, "model_type = 'qwen2'"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type = 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"hidden_size": "64"}, "hidden_size = '64': is no whole number"),
        ({"hidden_size": -64}, "is no whole number above 0"),
        ({"num_hidden_layers": 10**9}, "is more than the 21 tensors"),
        ({"num_key_value_heads": 3}, "does not divide 4"),
        ({"rms_norm_eps": float("nan")}, "is no number"),
        ({"tie_word_embeddings": True}, "unexpected lm_head.weight"),
        ({"vocab_size": 128}, "of another shape model.embed_tokens.weight"),
    ],
)
def test_a_config_that_is_not_computed_or_made_up(folder, tmp_path, values, message):
    change_config(folder, **values)
    refused(folder, tmp_path, message)


def lie(name, **values):
    return lambda header: header[name].update(values)


def overlap(header):
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"][
        "data_offsets"
    ]


HEADERS = {
    "larger shape": (lie("model.norm.weight", shape=[1 << 40]), "takes .* bytes by its shape"),
    "smaller shape": (lie("lm_head.weight", shape=[1, 64]), "takes .* bytes by its shape"),
    "negative": (lie("model.norm.weight", shape=[-64]), "has no dtype, shape and data_offsets"),
    "no number": (lie("model.norm.weight", shape=["64"]), "has no dtype, shape"),
    "beyond": (lie("model.norm.weight", data_offsets=[1 << 50, (1 << 50) + 256]), "is cut off"),
    "overlap": (overlap, "lies over|belong to no tensor"),
    "quantised": (lie("model.norm.weight", dtype="I8"), "is of dtype I8"),
    "no object": (lambda header: header.update({"x": 3}), "has no dtype"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers(folder, tmp_path, case):
    change, message = HEADERS[case]
    change_header(folder, change)
    refused(folder, tmp_path, message)


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "cut off"), (5, "cut off"), (100, "cut off within"), (3000, "cut off"), (-1, "cut off")],
)
def test_cut_files(folder, tmp_path, length, message):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, tmp_path, message)


def test_garbage_and_deep_json(folder, tmp_path):
    path = folder / "model.safetensors"
    for text, message in (
        (b"[" * 50_000, "no safetensors header"),
        (b"nonsense", "no safetensors"),
    ):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        refused(folder, tmp_path, message)
    (folder / "config.json").write_text("[" * 50_000)
    refused(folder, tmp_path, "config.json: cannot be read")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.safetensors", "is no file beside it"),
        ("/etc/passwd", "is no file beside it"),
        ("..\\secret.safetensors", "is no file beside it"),
        ("model.bin", "is no file beside it"),
        (7, "is no file beside it"),
        ("absent.safetensors", "cannot be read"),
    ],
)
def test_an_index_that_leads_elsewhere(folder, tmp_path, name, message):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    weight_map = dict.fromkeys(names, "part.safetensors") | {"model.norm.weight": name}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, tmp_path, message)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "x"], "part.safetensors")}))
    refused(folder, tmp_path, "x is in none of its files")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    import_hf(folder, tmp_path / "in", Importing())


def test_pickles_are_refused_and_even_with_the_option_run_nothing(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    refused(folder, tmp_path, "holds neither")
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, tmp_path, "is a pickle, which can run code.*--allow-pickle-weights-only")
    imported = import_hf(folder, tmp_path / "good", Importing(), allow_pickle=True)
    with single_process():
        export_checkpoint(imported.checkpoint, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(weights | {"x": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        import_hf(folder, tmp_path / "bad", Importing(), allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_a_tied_head_may_be_there_twice_but_not_as_another(tmp_path):
    folder = write_hf_folder(tmp_path / "made", variant="odd vocabulary, tied")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    import_hf(folder, tmp_path / "good", Importing())
    head[300, 63] += 1
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    refused(folder, tmp_path, "unexpected lm_head.weight")
