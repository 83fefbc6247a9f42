"""Which class computes what under each backend, and which backend a configuration gets."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from typing import Any

import pytest
import torch
import yaml
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from litespark.config import validate
from litespark.errors import UserError
from litespark.models.backends import (
    Backend,
    TransformerEngineBackend,
    TritonBackend,
    backend_for,
    select_backend,
)
from litespark.models.layer_specs import layer_spec, slot_table
from litespark.models.transformer_config import transformer_config
from litespark.modules.core_attention import ReferenceCoreAttention
from litespark.modules.fused_attention import FusedSelfAttention
from litespark.modules.fused_core_attention import FusedCoreAttention
from litespark.modules.fused_layer import FusedTransformerLayer
from litespark.modules.fused_mlp import FusedMLP
from litespark.modules.fused_norm import FusedRMSNorm
from litespark.modules.norm import RMSNorm
from tests.support import cli
from tests.support.configs import loader
from tests.support.runs import config_tree, write_shard

FP8 = "precision.mode=fp8"


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path)


@pytest.fixture
def machine(monkeypatch):
    """A machine without a GPU, or with one of a compute capability, with or without TE."""

    def machine(capability: tuple[int, int] | None, *, has_te: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        found = importlib.util.find_spec

        def find_spec(name, *rest):
            if name == "transformer_engine":
                return types.SimpleNamespace() if has_te else None
            return found(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return machine


# ----------------------------------------------------------------------------------------- slots


def slots(backend: Backend) -> dict[str, Any]:
    """The classes in the specification that the model is built from."""
    layer: Any = layer_spec(backend)
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    return {
        "layer": layer.module,
        "input_layernorm": layer.submodules.input_layernorm,
        "self_attention": attention.module,
        "linear_qkv": attention.submodules.linear_qkv,
        "q_layernorm": attention.submodules.q_layernorm,
        "k_layernorm": attention.submodules.k_layernorm,
        "core_attention": attention.submodules.core_attention.module,
        "linear_proj": attention.submodules.linear_proj,
        "pre_mlp_layernorm": layer.submodules.pre_mlp_layernorm,
        "mlp": mlp.module,
        "linear_fc1": mlp.submodules.linear_fc1,
        "linear_fc2": mlp.submodules.linear_fc2,
        "final_layernorm": backend.layer_norm(rms_norm=True),
    }


# Linears under both are megatron-core's: their parameters, names and sharded checkpoints.
LINEARS = {
    "linear_qkv": ColumnParallelLinear,
    "linear_proj": RowParallelLinear,
    "linear_fc1": ColumnParallelLinear,
    "linear_fc2": RowParallelLinear,
}
NO_HEAD_NORMS = {"q_layernorm": IdentityOp, "k_layernorm": IdentityOp}


def test_slots_of_the_reference(load):
    """megatron-core's control flow, with the norm and the attention that run on any device."""
    backend = Backend(load())
    assert slots(backend) == LINEARS | NO_HEAD_NORMS | {
        "layer": TransformerLayer,
        "input_layernorm": RMSNorm,
        "self_attention": SelfAttention,
        "core_attention": ReferenceCoreAttention,
        "pre_mlp_layernorm": RMSNorm,
        "mlp": MLP,
        "final_layernorm": RMSNorm,
    }
    assert backend.layer_arguments() == {}
    assert not backend.fused_head


def test_qk_norm_fills_the_slots_of_query_and_key(load):
    found = slots(Backend(load("model.qk_norm=true")))
    assert found["q_layernorm"] is found["k_layernorm"] is RMSNorm


@pytest.mark.parametrize("key", ["qkv_bias", "qk_norm"])
def test_the_fused_blocks_leave_qwens_parts_to_the_reference(key, load, machine, caplog):
    machine((9, 0), has_te=True)
    with caplog.at_level(logging.WARNING, "litespark.models"):
        assert type(select_backend(load(f"model.{key}=true"))) is Backend
    (message,) = caplog.messages
    assert message.endswith(f"(model.{key})")
    for name in ("triton", "te"):
        config = load(f"model.{key}=true", f"model.backend={name}", "precision.mode=bf16")
        with pytest.raises(UserError, match=f"model.{key}"):
            backend_for(config)
        assert any(f"model.{key}" in str(error) for error in validate(config, 1))
    assert any("precision.mode=bf16" in str(e) for e in validate(load(f"model.{key}=true", FP8), 1))


def test_slots_of_triton(load):
    """Subclasses of the stock modules, so that parameters and what decodes are the same."""
    backend = TritonBackend(load())
    found = slots(backend)
    assert found == LINEARS | NO_HEAD_NORMS | {
        "layer": FusedTransformerLayer,
        "input_layernorm": FusedRMSNorm,
        "self_attention": FusedSelfAttention,
        "core_attention": FusedCoreAttention,
        "pre_mlp_layernorm": FusedRMSNorm,
        "mlp": FusedMLP,
        "final_layernorm": FusedRMSNorm,
    }
    stock_modules = {"layer": TransformerLayer, "self_attention": SelfAttention, "mlp": MLP}
    for slot, stock in stock_modules.items():
        assert issubclass(found[slot], stock)
    assert backend.layer_arguments() == {"policy": backend.policy}
    assert backend.fused_head


@pytest.fixture
def te(monkeypatch):
    """Transformer Engine's provider, which needs the package, with classes that tell their slot."""

    class Provider:
        def column_parallel_layer_norm_linear(self):
            return type("NormedLinear", (), {})

        def column_parallel_linear(self):
            return type("ColumnLinear", (), {})

        def row_parallel_linear(self):
            return type("RowLinear", (), {})

        def layer_norm(self, rms_norm, for_qk):
            assert rms_norm
            return type("Norm", (), {})

        def core_attention(self):
            return type("Attention", (), {})

    name = "megatron.core.extensions.transformer_engine_spec_provider"
    module = types.ModuleType(name)
    module.__dict__["TESpecProvider"] = Provider
    monkeypatch.setitem(sys.modules, name, module)


def test_slots_of_transformer_engine(load, te):
    """The norm lives in the linear after it: a norm in its own slot would be applied twice."""
    backend = TransformerEngineBackend(load())
    found = {name: filled.__name__ for name, filled in slots(backend).items()}
    assert found == {
        "layer": "TransformerLayer",
        "input_layernorm": IdentityOp.__name__,
        "self_attention": "SelfAttention",
        "linear_qkv": "NormedLinear",
        "q_layernorm": IdentityOp.__name__,
        "k_layernorm": IdentityOp.__name__,
        "core_attention": "Attention",
        "linear_proj": "RowLinear",
        "pre_mlp_layernorm": IdentityOp.__name__,
        "mlp": "MLP",
        "linear_fc1": "NormedLinear",
        "linear_fc2": "RowLinear",
        "final_layernorm": "Norm",
    }
    assert backend.fused_head


@pytest.mark.parametrize("provider", [Backend, TritonBackend])
def test_the_table_at_the_start_shows_what_is_built(provider, load):
    backend = provider(load())
    table = {name: shown for names, shown in slot_table(backend) for name in names.split(", ")}
    assert table == {name: filled.__name__ for name, filled in slots(backend).items()}


# --------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_auto_on_a_cpu_is_plain_torch(mode, load, machine, caplog):
    """Faster there than the references of the kernels, and no loss: nothing is said."""
    machine(None)
    with caplog.at_level(logging.INFO, "litespark.models"):
        backend = select_backend(load(f"precision.mode={mode}"))
    assert type(backend) is Backend
    assert caplog.messages == []


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_auto_with_fp8_on_a_cpu_is_triton(recipe, load, machine):
    machine(None)
    assert type(select_backend(load(FP8, f"precision.recipe={recipe}"))) is TritonBackend


@pytest.mark.parametrize(
    ("capability", "mode"),
    [((8, 0), "bf16"), ((8, 0), "fp32"), ((8, 9), "fp8"), ((9, 0), "fp8"), ((10, 0), "bf16")],
)
def test_auto_on_a_gpu_is_triton(capability, mode, load, machine, caplog):
    """Never Transformer Engine, even where it is installed: for that one asks."""
    machine(capability, has_te=True)
    assert type(select_backend(load(f"precision.mode={mode}"))) is TritonBackend
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("capability", "overrides", "words"),
    [
        ((7, 5), [], ["compute capability 8.0 for bf16", "has 7.5"]),
        (
            (9, 0),
            ["parallel.tensor=4", "model.num_query_groups=2"],
            ["key/value heads", "2 for 4"],
        ),
    ],
)
def test_auto_falls_back_loudly(capability, overrides, words, load, machine, caplog):
    machine(capability)
    backend = select_backend(load("precision.mode=bf16", *overrides))
    assert type(backend) is Backend
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for word in ["the fused backend is not used", *words]:
        assert word in record.getMessage()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (7, 0)])
def test_auto_with_fp8_has_nothing_to_fall_back_to(capability, load, machine):
    machine(capability)
    with pytest.raises(UserError) as error:
        select_backend(load(FP8))
    text = str(error.value)
    for word in ("precision.mode = fp8", "8.9 for fp8", f"{capability[0]}.{capability[1]}", "bf16"):
        assert word in text


@pytest.mark.parametrize(
    ("capability", "overrides", "words"),
    [
        (None, ["model.backend=te"], ["model.backend = te", "needs a CUDA device"]),
        ((9, 0), ["model.backend=te"], ["needs Transformer Engine", "pip install 'litespark[te]'"]),
        ((7, 5), ["model.backend=triton", "precision.mode=bf16"], ["backend = triton", "has 7.5"]),
        ((8, 0), ["model.backend=triton", FP8], ["model.backend = triton", "8.9 for fp8"]),
        (None, ["model.backend=reference", FP8], ["backend = reference", "computes no FP8"]),
        (
            None,
            ["model.backend=triton", "parallel.tensor=4", "model.num_query_groups=2"],
            ["model.backend = triton", "2 for 4"],
        ),
    ],
)
def test_what_was_asked_for_by_name_and_cannot_is_an_error(
    capability, overrides, words, load, machine
):
    """Never another backend in its place."""
    machine(capability)
    with pytest.raises(UserError) as error:
        backend_for(load(*overrides))
    for word in [*words, "model.backend=auto"]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "capability", "provider"),
    [
        ("reference", None, Backend),
        ("reference", (9, 0), Backend),
        ("triton", None, TritonBackend),
        ("triton", (8, 0), TritonBackend),
        ("te", (9, 0), TransformerEngineBackend),
    ],
)
def test_what_was_asked_for_by_name_is_taken(name, capability, provider, load, machine):
    machine(capability, has_te=True)
    assert backend_for(load(f"model.backend={name}")) == (provider, None)


def test_a_backend_that_cannot_ends_the_run_before_the_first_step(tmp_path, monkeypatch):
    """Exit code 2, one message, and no folder that looks like a run's."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config_tree(tmp_path, write_shard(tmp_path / "tokens"))))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = cli.run("train", str(path), "model.backend=te", "precision.mode=bf16")
    assert done.returncode == 2, done.stderr
    assert "model.backend = te: needs a CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ------------------------------------------------------------------- megatron-core's configuration


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_only_transformer_engine_is_driven_by_megatron_core(backend, load):
    """The fused blocks quantise by themselves: megatron-core must not, and computes in BF16."""
    mode = "precision.mode=bf16" if backend == "reference" else FP8
    core = transformer_config(load(f"model.backend={backend}", mode))
    assert (core.transformer_impl, core.fp8) == ("local", None)
    assert core.params_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.backend=reference", FP8], "not computed by model.backend = reference"),
        (["model.backend=te", "precision.mode=fp32"], "computes in bf16 or fp8"),
    ],
)
def test_what_no_machine_can_do_is_found_by_the_launcher(overrides, words, load):
    """Before any process starts."""
    assert words in "\n".join(map(str, validate(load(*overrides), 1)))


def test_attention_by_name(load):
    config = load("model.backend=triton", "model.attention=sdpa-math")
    spec = layer_spec(select_backend(config))
    slot = spec.submodules.self_attention.submodules.core_attention
    assert slot.params == {"forced_backend": "sdpa-math"}
    unnamed = layer_spec(select_backend(load("model.backend=triton")))
    slot = unnamed.submodules.self_attention.submodules.core_attention
    assert slot.params == {"forced_backend": None}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backend=triton", "model.attention=flash2"], "flash2.*needs a CUDA device"),
        (["model.backend=reference", "model.attention=sdpa-math"], "takes reference"),
    ],
)
def test_attention_that_cannot_be_used_is_an_error(load, machine, overrides, message):
    machine(None)
    with pytest.raises(UserError, match=message):
        select_backend(load(*overrides))
