"""Megatron-LM's torch_dist checkpoints in: weights of a GPT that megatron-core built and saved."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from litespark.checkpoint.hf.import_ import Importing, write_checkpoint
from litespark.checkpoint.megatron import open_megatron
from litespark.checkpoint.sharded import sharding_metadata
from litespark.cli.main import main
from litespark.errors import UserError
from litespark.training.single import load_model, single_process

VOCAB, PADDED = 100, 112
ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": VOCAB,
    "padded_vocab_size": PADDED,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "position_embedding_type": "rope",
    "rotary_base": 20000,
    "rotary_percent": 1.0,
    "untie_embeddings_and_output_weights": True,
    "attention_backend": AttnBackend.auto,
    "params_dtype": torch.float32,
}


def build():
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.15,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        PADDED,
        64,
        position_embedding_type="rope",
        rotary_base=20000,
        share_embeddings_and_output_weights=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run's checkpoints, and the saved model's logits."""
    run = tmp_path_factory.mktemp("megatron")
    folder = run / "iter_0000100"
    folder.mkdir()
    tokens_bs = torch.randint(VOCAB, (2, 40), generator=torch.manual_seed(3))
    with single_process(), torch.no_grad():
        model = build()
        state = model.sharded_state_dict(metadata=sharding_metadata())
        common = {"args": argparse.Namespace(**ARGUMENTS), "iteration": 100}
        dist_checkpointing.save({**state, **common}, str(folder))
        logits_bsv = model(tokens_bs, torch.arange(40).expand(2, -1), None)[..., :VOCAB]
    (run / "latest_checkpointed_iteration.txt").write_text("100")
    return run, tokens_bs, logits_bsv


def test_the_imported_model_has_the_same_logits(made, tmp_path, capsys):
    run, tokens_bs, expected_bsv = made
    assert main(["import", "--from", "megatron", str(run), str(tmp_path / "in")]) == 0
    with single_process(), torch.no_grad():
        model, config = load_model(tmp_path / "in/step_000000000")
        found_bsv = model(tokens_bs, torch.arange(40).expand(2, -1), None)[..., :VOCAB]
    assert config.model.qkv_bias
    assert config.model.vocab_size == VOCAB
    assert config.model.padded_vocab_size == 128
    assert config.model.rope_theta == 20000
    difference = (found_bsv - expected_bsv).abs().max() / expected_bsv.abs().max()
    assert difference < 1e-5
    assert expected_bsv.std() > 0.1


def test_arguments_that_are_more_than_data_are_not_run(made, tmp_path):
    run, *_ = made
    folder = tmp_path / "iter_0000100"
    folder.mkdir()
    for path in (run / "iter_0000100").iterdir():
        os.link(path, folder / path.name)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (folder / "common.pt").unlink()
    torch.save({"args": argparse.Namespace(**ARGUMENTS, x=Bomb())}, folder / "common.pt")
    with single_process():
        with pytest.raises(UserError, match=r"holds more than plain data.*--config FILE"):
            open_megatron(folder, None)
        assert not (tmp_path / "exploded").exists()
        source = open_megatron(run, None)
        assert write_checkpoint(open_megatron(folder, source.model), tmp_path / "in", Importing())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm'"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"ffn_hidden_size": 80}, "the model has"),
        ({"num_layers": None}, "no possible model"),
    ],
)
def test_models_that_are_not_computed(made, tmp_path, values, message):
    run, *_ = made
    folder = Path(tmp_path / "iter")
    folder.mkdir()
    for path in (run / "iter_0000100").iterdir():
        if path.name != "common.pt":
            os.link(path, folder / path.name)
    torch.save({"args": argparse.Namespace(**ARGUMENTS | values)}, folder / "common.pt")
    with single_process(), pytest.raises(UserError, match=message):
        open_megatron(folder, None)


def test_what_is_no_checkpoint(tmp_path, capsys):
    assert main(["import", "--from", "megatron", str(tmp_path), str(tmp_path / "in")]) == 2
    assert "holds no .metadata" in capsys.readouterr().err
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    assert main(["import", "--from", "megatron", str(tmp_path), str(tmp_path / "in")]) == 2
    assert "says '../../etc'" in capsys.readouterr().err
