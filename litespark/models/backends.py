"""Spec providers: who computes each slot of a transformer layer.

A backend answers megatron-core's questions ("which norm?", "which core attention?") with a class.
Adding a backend is adding a provider; the control flow that uses the answers is written once, in
`layer_specs.py`.  Parameters have the same names under all of them, so that a checkpoint does not
know which wrote it.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from litespark.config.schema import RunConfig
from litespark.errors import UserError
from litespark.fp8.policy import PrecisionPolicy
from litespark.modules.core_attention import ReferenceCoreAttention
from litespark.modules.low_rank import (
    AdaptedColumnParallelLinear,
    AdaptedRowParallelLinear,
    with_adapters,
)
from litespark.modules.norm import RMSNorm

logger = logging.getLogger("litespark.models")


class Backend(LocalSpecProvider):
    """Plain torch on any device: megatron-core's linears, Litespark's RMSNorm and attention.

    `fused_head` says whether the LM head and the loss are computed together, in chunks of tokens.
    """

    name = "reference"
    fused_head = False

    def __init__(self, config: RunConfig) -> None:
        self.policy = PrecisionPolicy(config.precision, config.model.num_layers)
        self.has_head_norm = config.model.qk_norm
        named = config.model.attention
        self.attention: str | None = None if named == "auto" else named
        self.lora = config.lora

    @classmethod
    def obstacle(cls, config: RunConfig) -> str | None:
        """Why this backend cannot compute `config` on this machine; None: it can."""
        return "computes no FP8" if config.precision.mode == "fp8" else None

    def layer(self) -> type:
        """The transformer layer."""
        return TransformerLayer

    def layer_arguments(self) -> dict[str, Any]:
        """What the layer is built with beside megatron-core's arguments."""
        return {}

    def self_attention(self) -> type:
        """Norm to projection."""
        return SelfAttention

    def mlp(self) -> type:
        """FC1, SwiGLU, FC2."""
        return MLP

    def normed_linear(self) -> tuple[type, type]:
        """The norm before a block and the block's first linear."""
        return self.layer_norm(rms_norm=True), self.column_parallel_linear()

    def column_parallel_linear(self) -> type:
        """Linear split over its outputs, with an adapter where the run has them."""
        if self.lora is None:
            return super().column_parallel_linear()
        return with_adapters(AdaptedColumnParallelLinear, self.lora)

    def row_parallel_linear(self) -> type:
        """Linear split over its inputs, with an adapter where the run has them."""
        if self.lora is None:
            return super().row_parallel_linear()
        return with_adapters(AdaptedRowParallelLinear, self.lora)

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """The norm of every norm slot; there is no other than RMSNorm."""
        return RMSNorm

    def head_norm(self) -> type:
        """The norm of each head's query and key; most models have none."""
        return self.layer_norm(rms_norm=True, for_qk=True) if self.has_head_norm else IdentityOp

    def core_attention(self) -> type:
        """Softmax attention between the QKV and the output projection."""
        return ReferenceCoreAttention

    def core_attention_arguments(self) -> dict[str, Any]:
        """What the core attention is built with beside megatron-core's arguments."""
        return {}


class TritonBackend(Backend):
    """Litespark's fused blocks: Triton kernels on a GPU, their torch references elsewhere."""

    name = "triton"
    fused_head = True

    @classmethod
    def obstacle(cls, config: RunConfig) -> str | None:
        """Why this backend cannot compute `config` on this machine; None: it can."""
        if config.model.num_query_groups < config.parallel.tensor:
            return (
                f"splits key/value heads over tensor-parallel ranks, and there are "
                f"{config.model.num_query_groups} for {config.parallel.tensor}"
            )
        lacking = _beyond_llama(config)
        if lacking is not None:
            return lacking
        if not torch.cuda.is_available():
            return None
        needed = (8, 9) if config.precision.mode == "fp8" else (8, 0)
        found = torch.cuda.get_device_capability()
        if found < needed:
            return (
                f"needs a GPU of compute capability {needed[0]}.{needed[1]} for "
                f"{config.precision.mode}, and this one has {found[0]}.{found[1]}"
            )
        return None

    def layer(self) -> type:
        """Two fused blocks."""
        from litespark.modules.fused_layer import FusedTransformerLayer

        return FusedTransformerLayer

    def layer_arguments(self) -> dict[str, Any]:
        """The number formats of the layers."""
        return {"policy": self.policy}

    def self_attention(self) -> type:
        """Fused norm, QKV, RoPE; core attention; projection."""
        from litespark.modules.fused_attention import FusedSelfAttention

        return FusedSelfAttention

    def mlp(self) -> type:
        """Fused residual add, norm, FC1, SwiGLU, FC2, residual add."""
        from litespark.modules.fused_mlp import FusedMLP

        return FusedMLP

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Holds the blocks' norm weights; computes the final norm."""
        from litespark.modules.fused_norm import FusedRMSNorm

        return FusedRMSNorm

    def core_attention(self) -> type:
        """The fastest attention library there is."""
        from litespark.modules.fused_core_attention import FusedCoreAttention

        return FusedCoreAttention

    def core_attention_arguments(self) -> dict[str, Any]:
        """The library that the configuration names, if it names one."""
        return {"forced_backend": self.attention}


class TransformerEngineBackend(Backend):
    """Transformer Engine's modules, for comparison; the norm lives inside the linear after it."""

    name = "te"
    fused_head = True

    @classmethod
    def obstacle(cls, config: RunConfig) -> str | None:
        """Why this backend cannot compute `config` on this machine; None: it can."""
        # In this order: without a GPU the package is hidden (`prepare_megatron`).
        if not torch.cuda.is_available():
            return "needs a CUDA device"
        if importlib.util.find_spec("transformer_engine") is None:
            return "needs Transformer Engine: pip install 'litespark[te]'"
        return _beyond_llama(config)

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        self.provider = TESpecProvider()

    def normed_linear(self) -> tuple[type, type]:
        """No norm of its own, and a linear that begins with one."""
        linear = self.provider.column_parallel_layer_norm_linear()
        assert linear is not None, "Transformer Engine always has one"
        return IdentityOp, linear

    def column_parallel_linear(self) -> type:
        """Linear split over its outputs."""
        return self.provider.column_parallel_linear()

    def row_parallel_linear(self) -> type:
        """Linear split over its inputs."""
        return self.provider.row_parallel_linear()

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """The final norm."""
        return self.provider.layer_norm(rms_norm, for_qk)

    def core_attention(self) -> type:
        """cuDNN's or FlashAttention's, as Transformer Engine chooses."""
        return self.provider.core_attention()


def _beyond_llama(config: RunConfig) -> str | None:
    """What only the reference computes: the parts of Qwen's attention that Llama's lacks."""
    if config.model.qkv_bias:
        return "computes no QKV bias (model.qkv_bias)"
    return "computes no QK-norm (model.qk_norm)" if config.model.qk_norm else None


BACKENDS: dict[str, type[Backend]] = {
    "reference": Backend,
    "triton": TritonBackend,
    "te": TransformerEngineBackend,
}


def backend_for(config: RunConfig) -> tuple[type[Backend], str | None]:
    """The provider for `model.backend`, and why `auto` does not take the fused one, if it does not.

    `auto` takes the fastest that can compute `config`.

    Raises:
        UserError: the backend that was asked for by name cannot, or none can.
    """
    provider, obstacle = _fastest_or_named(config)
    if config.model.attention != "auto":
        if provider is not TritonBackend:
            raise UserError(
                f"model.attention = {config.model.attention}",
                f"is a choice of model.backend = triton; this run takes {provider.name}",
                "Set model.attention=auto, or model.backend=triton.",
            )
        _check_attention(config)
    return provider, obstacle


def _check_attention(config: RunConfig) -> None:
    """Raise a UserError if the attention asked for by name cannot compute this run here."""
    from litespark.modules.attention_backends import AttentionCase
    from litespark.modules.attention_choice import choose_attention

    model, parallel = config.model, config.parallel
    on_gpu = torch.cuda.is_available()
    length, batch = config.data.sequence_length, config.batch.micro
    if config.data.document_mask:  # the rows are joined (`language_modelling.py`)
        length, batch = length * batch, 1
    queries = length // (2 * parallel.context) if parallel.context > 1 else length
    case = AttentionCase(
        batch=batch,
        q_length=queries,
        kv_length=queries if config.data.document_mask else length,
        heads=model.num_attention_heads // parallel.tensor,
        groups=max(1, model.num_query_groups // parallel.tensor),
        head_dim=model.head_dim,
        dtype=torch.float32 if config.precision.mode == "fp32" else torch.bfloat16,
        device_type="cuda" if on_gpu else "cpu",
        capability=torch.cuda.get_device_capability() if on_gpu else None,
        variable_length=config.data.document_mask,
    )
    choose_attention(case, force=model.attention)


def _fastest_or_named(config: RunConfig) -> tuple[type[Backend], str | None]:
    name = config.model.backend
    if name != "auto":
        obstacle = BACKENDS[name].obstacle(config)
        if obstacle is not None:
            raise UserError(
                f"model.backend = {name}", obstacle, "Set model.backend=auto to take another."
            )
        return BACKENDS[name], None
    # On a CPU the fused blocks are slower than plain torch; only FP8 needs them.
    if not torch.cuda.is_available() and config.precision.mode != "fp8":
        return Backend, None
    obstacle = TritonBackend.obstacle(config)
    if obstacle is None:
        return TritonBackend, None
    if Backend.obstacle(config) is not None:
        raise UserError(
            f"precision.mode = {config.precision.mode}",
            f"is computed by model.backend = triton, which {obstacle}",
            "Set precision.mode=bf16.",
        )
    return Backend, obstacle


def select_backend(config: RunConfig) -> Backend:
    """The provider for `model.backend`; says so where `auto` cannot take the fastest.

    Raises:
        UserError: see `backend_for`.
    """
    provider, obstacle = backend_for(config)
    if obstacle is not None:
        logger.warning("the fused backend is not used: it %s", obstacle)
    return provider(config)
