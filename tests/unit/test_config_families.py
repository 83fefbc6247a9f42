"""The model's parts beyond Llama's, and what goes with them."""

from __future__ import annotations

import pytest

from litespark.config.validate import validate
from tests.support.configs import loader


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.family=qwen2"], "model.qkv_bias = false: the family qwen2 has it"),
        (["model.family=qwen3", "model.qkv_bias=true"], "model.qk_norm = false: the family qwen3"),
        (["model.family=llama", "model.qk_norm=true"], "the family llama does not have it"),
        (["model.sliding_window=32"], "data.sequence_length = 64: is above model.sliding_window"),
        (["checkpoint.export_hf_every=4"], "no multiple of training.save_every = null"),
        (["checkpoint.export_hf_every=4", "training.save_every=3"], "training.save_every = 3"),
    ],
)
def test_what_does_not_go_together(load, overrides, message):
    errors = [str(error) for error in validate(load(*overrides), 1)]
    assert any(message in error for error in errors), errors


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.qkv_bias=true"],
        ["model.qk_norm=true", "model.family=qwen3"],
        ["model.family=mistral", "model.sliding_window=64"],
        ["checkpoint.export_hf_every=6", "training.save_every=3"],
    ],
)
def test_what_does(load, overrides):
    assert validate(load(*overrides), 1) == []


def test_the_family_follows_from_the_parts(load):
    assert load().model.hf_family == "llama"
    assert load("model.qkv_bias=true").model.hf_family == "qwen2"
    assert load("model.qk_norm=true").model.hf_family == "qwen3"
    assert load("model.family=mistral").model.hf_family == "mistral"


def test_generation_stops_where_the_window_would_begin_to_count(load):
    model = load("model.sliding_window=100").model
    assert model.longest_exact_sequence == 100
    assert load("model.sliding_window=100000").model.longest_exact_sequence == 512
