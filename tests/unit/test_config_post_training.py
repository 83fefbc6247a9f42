"""What `task`, `dpo` and `lora` refuse, each by the key that is wrong."""

from __future__ import annotations

import pytest

from litespark.config import validate
from litespark.errors import UserError
from tests.support.configs import loader


def texts(config):
    return [str(error) for error in validate(config, 1)]


def test_chats_are_always_masked(tmp_path):
    load = loader(tmp_path)
    assert not load().data.document_mask
    for task in ("sft", "dpo"):
        assert load(f"task={task}").data.document_mask
        assert texts(load(f"task={task}")) == []
        (error,) = texts(load(f"task={task}", "data.document_mask=false"))
        assert "data.document_mask = false" in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dpo.beta=0.2"], "task = pretrain"),
        (["task=sft", "dpo.beta=0.2"], "task = sft"),
        (["task=dpo", "dpo.loss=ipo", "dpo.label_smoothing=0.1"], "dpo.label_smoothing = 0.1"),
        (
            ["task=dpo", "precision.mode=fp8", "precision.recipe=delayed"],
            "precision.recipe = delayed with task = dpo",
        ),
        (
            ["lora.rank=4", "precision.mode=fp8", "precision.primary_weights=fp8"],
            "precision.primary_weights = fp8 with lora",
        ),
        (["lora.rank=4", "model.backend=te", "precision.mode=bf16"], "lora with model.backend"),
    ],
)
def test_what_cannot_be_is_refused(overrides, words, tmp_path):
    assert any(words in text for text in texts(loader(tmp_path)(*overrides)))


@pytest.mark.parametrize(
    "override", ["dpo.beta=0", "lora.rank=0", "lora.targets=[linear_q]", "dpo.loss=hinge"]
)
def test_values_out_of_range(override, tmp_path):
    with pytest.raises(UserError):
        loader(tmp_path)("task=dpo", override)


def test_adapters_need_their_own_weights(tmp_path):
    load = loader(tmp_path)
    options = ["task=dpo", "lora.rank=4", "dpo.reference=frozen"]
    options += ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    assert any("overlap_param_gather" in text for text in texts(load(*options)))
    tied = load("lora.rank=4", "model.tie_embeddings=true", "parallel.pipeline=2")
    assert any("tie_embeddings" in str(error) for error in validate(tied, 2))
