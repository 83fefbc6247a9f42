"""Adapters leave merged or alone: both give the model that training computed with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litespark.checkpoint.hf.adapters import export_adapter
from litespark.checkpoint.hf.export import export_checkpoint
from litespark.config.schema import RunConfig
from litespark.errors import UserError
from litespark.models.initialize import named_parameters_globally
from litespark.parallel.rng import named_generator
from litespark.training.single import load_model, single_process
from tests.integration import tiny
from tests.support.spawn import run_distributed

LORA = {"rank": 4, "alpha": 8.0}


def values_of(folder, **more):
    values = tiny.tiny_values(str(folder))
    return {**values, "lora": LORA, "parallel": {"tensor": 2}, **more}


def write_trained_rank(rank, world_size, values):
    """A checkpoint whose adapters add something."""
    original = tiny.build

    def build(config: RunConfig):
        chunks = original(config)
        for chunk in chunks:
            for name, parameter in named_parameters_globally(chunk):
                if name.endswith("lora_b"):
                    generator = named_generator(rank, name, parameter.device)
                    with torch.no_grad():
                        parameter.normal_(0.0, 0.1, generator=generator)
        return chunks

    tiny.build = build
    return tiny.write_checkpoint(rank, world_size, values)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return Path(run_distributed(write_trained_rank, 2, values_of(folder))[0])


def test_merged_and_peft_exports_are_the_trained_model(checkpoint, tmp_path):
    tokens_bs = torch.arange(40).view(2, 20)
    with single_process():
        model, _ = load_model(checkpoint)
        with torch.no_grad():
            expected = model(tokens_bs, torch.arange(20).expand(2, -1), None)
            for module in model.modules():
                if hasattr(module, "lora_b"):
                    module.is_enabled = False
            base = model(tokens_bs, torch.arange(20).expand(2, -1), None)
        export_checkpoint(checkpoint, tmp_path / "merged")
        count = export_adapter(checkpoint, tmp_path / "adapter")
    assert float((expected - base).abs().max()) > 0.1, "the adapters add nothing here"
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        found = merged(tokens_bs).logits
    torch.testing.assert_close(found, expected[..., : found.size(-1)], rtol=1e-4, atol=1e-4)

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert count == sum(tensor.numel() for tensor in tensors.values())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    # The file adds to the base what the merged export has more: weight by weight.
    weights = dict(merged.named_parameters())
    for name in (name for name in tensors if name.endswith("lora_A.weight")):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        with torch.no_grad():
            weights[f"{module}.weight"] -= config["lora_alpha"] / config["r"] * product
    with torch.no_grad():
        torch.testing.assert_close(
            merged(tokens_bs).logits, base[..., : found.size(-1)], rtol=1e-3, atol=1e-3
        )
    if importlib.util.find_spec("peft") is not None:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(merged, str(tmp_path / "adapter"))
        with torch.no_grad():
            torch.testing.assert_close(adapted(tokens_bs).logits, found, rtol=1e-3, atol=1e-3)


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    values = tiny.tiny_values(str(tmp_path))
    checkpoint = Path(run_distributed(tiny.write_checkpoint, 1, values)[0])
    with single_process(), pytest.raises(UserError, match="no low-rank adapters"):
        export_adapter(checkpoint, tmp_path / "adapter")
