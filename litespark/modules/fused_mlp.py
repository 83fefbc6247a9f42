"""Fused MLP block: residual add, norm, FC1, SwiGLU, FC2, residual add, as one autograd function.

Between any two products stands one kernel:

    sum = x + attention's output; RMSNorm      -> FC1's input, in FP8 both ways round
    FC1
    SwiGLU                                     -> FC2's input in FP8; FC1's output in FP8 to keep
    FC2
    sum + output

and in backward

    the incoming gradient in FP8, both ways round
    FC2's input gradient
    SwiGLU's derivative                        -> FC1's gradient, in FP8 both ways round, and FC2's
                                                  input again, for its weight's gradient
    FC1's input gradient
    norm's derivative + incoming gradient      -> gradient of x and of attention's output

Kept for backward are the sum [m, h], FC1's input, and FC1's output [m, 2f], by far the largest.
FC2's input is not kept in FP8: SwiGLU's backward reads all that it takes to make it again.

Shapes: m tokens of all tensor-parallel ranks, h hidden, f the FFN size of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from litespark.fp8.linear import Operand, as_matrix, keep_for_weight_gradient
from litespark.fp8.policy import LayerFormats, high_precision_formats
from litespark.modules.exchange import Exchange
from litespark.modules.parallel_linears import NormLinear, gathered_gradient, weight_of
from litespark.ops.formats import Fp8Matrix, QuantizeSpec
from litespark.ops.quantize import quantize
from litespark.ops.swiglu import swiglu, swiglu_backward


class FusedMLP(MLP):
    """megatron-core's MLP with its parameters and checkpoint names, computed as one block."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config, submodules, is_expert, input_size, ffn_hidden_size, tp_group)
        self.formats = high_precision_formats()
        group: Any = self.tp_group
        self.exchange = Exchange(group, sequence_parallel=config.sequence_parallel)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights after an optimizer step."""
        self.formats.fc1.refresh(weight_of(self.linear_fc1))
        self.formats.fc2.refresh(weight_of(self.linear_fc2))

    def add_to(self, x_sbh: Tensor, attention_sbh: Tensor, norm_weight_h: Tensor) -> Tensor:
        """x + attention + mlp(norm(x + attention)): the layer's output, [s, b, h]."""
        return _MlpBlock.apply(  # type: ignore[return-value] - one tensor
            x_sbh,
            attention_sbh,
            norm_weight_h,
            weight_of(self.linear_fc1),
            weight_of(self.linear_fc2),
            self,
            torch.is_grad_enabled(),
        )


class _MlpBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_sbh: Tensor,
        attention_sbh: Tensor,
        norm_weight_h: Tensor,
        weight1_nh: Tensor,
        weight2_hf: Tensor,
        block: FusedMLP,
        needs_gradient: bool,
    ) -> Tensor:
        formats, exchange = block.formats, block.exchange
        norm_fc1 = NormLinear(formats.fc1, exchange, block.config.layernorm_epsilon)
        gate_up_mn, saved = norm_fc1.forward(
            as_matrix(x_sbh),
            as_matrix(attention_sbh),
            norm_weight_h,
            weight1_nh,
            needs_gradient=needs_gradient,
            output_spec=_fc1_output_spec(formats),
        )
        operand, activated = _activate(gate_up_mn, formats, needs_gradient)
        del gate_up_mn
        if exchange.size == 1:  # the product adds the residual on its way out
            output_mh = formats.fc2.forward(operand, weight2_hf, saved.summed_mh)
        else:
            output_mh = exchange.reduce(formats.fc2.forward(operand, weight2_hf))
            output_mh += saved.summed_mh
        if needs_gradient:
            ctx.formats, ctx.exchange, ctx.norm_fc1 = formats, exchange, norm_fc1
            ctx.saved, ctx.activated = saved, activated
            ctx.save_for_backward(norm_weight_h, weight1_nh, weight2_hf)
        return output_mh.view(x_sbh.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        norm_weight_h, weight1_nh, weight2_hf = ctx.saved_tensors
        formats, activated = ctx.formats, ctx.activated
        doutput_mh = as_matrix(gradients[0])
        dfc2 = gathered_gradient(formats.fc2, ctx.exchange, doutput_mh)
        dactivation_mf = formats.fc2.input_gradient(dfc2, weight2_hf)
        dfc1, activation = _activate_backward(dactivation_mf, activated, formats)
        del dactivation_mf
        ctx.activated = activated = None  # frees the largest of what was kept
        dweight2 = formats.fc2.weight_gradient(dfc2, activation, weight2_hf)
        del dfc2, activation
        dsummed_mh, dnorm_weight, dweight1 = ctx.norm_fc1.backward(
            dfc1, ctx.saved, norm_weight_h, weight1_nh, doutput_mh
        )
        ctx.saved = None
        dsummed_sbh = dsummed_mh.view(gradients[0].shape)
        return dsummed_sbh, dsummed_sbh, dnorm_weight, dweight1, dweight2, None, None


@dataclass
class _Activated:
    """What SwiGLU's backward needs.

    `kept` is FC2's input for its weight's gradient; None where `spec` says how to make it again.
    """

    gate_up: Tensor | Fp8Matrix
    kept: Operand | None
    spec: QuantizeSpec | None


def _fc1_output_spec(formats: LayerFormats) -> QuantizeSpec | None:
    """How FC1 writes its output, where both of SwiGLU's scales are known beforehand."""
    point, after = formats.fc1_output, formats.fc2.input_point()
    if not formats.fc1_writes_fp8 or point is None or after is None or after.spec() is None:
        return None
    return point.spec()


def _activate(
    gate_up_mn: Tensor | Fp8Matrix, formats: LayerFormats, needs_gradient: bool
) -> tuple[Operand, _Activated]:
    """FC2's input, and what backward needs."""
    point = formats.fc2.input_point()
    if point is None:
        activation = swiglu(gate_up_mn).activation
        assert isinstance(activation, torch.Tensor)
        operand = formats.fc2.input_operand(activation, columns=needs_gradient)
        return operand, _Activated(gate_up_mn, keep_for_weight_gradient(operand), None)
    store = None
    keeps_copy = needs_gradient and formats.fc1_output is not None
    if keeps_copy and isinstance(gate_up_mn, torch.Tensor):
        assert formats.fc1_output is not None
        store = formats.fc1_output.spec_for(gate_up_mn)
    spec = point.spec()
    if spec is not None:
        output = swiglu(gate_up_mn, quantize=spec, store=store)
        operand = output.activation
    else:
        assert isinstance(gate_up_mn, torch.Tensor)
        amax = point.new_amax(gate_up_mn.device)
        output = swiglu(gate_up_mn, store=store, amax=amax)
        assert isinstance(output.activation, torch.Tensor)
        spec = point.spec_for(output.activation, amax)
        operand = quantize(output.activation, spec, columns=False)
    kept_gate_up = output.stored if output.stored is not None else gate_up_mn
    return operand, _Activated(kept_gate_up, None, spec)


def _activate_backward(
    dactivation_mf: Tensor, activated: _Activated, formats: LayerFormats
) -> tuple[Operand, Operand]:
    """FC1's output gradient, and FC2's input for its weight's gradient."""
    point = formats.fc1.gradient_point()
    spec = point.spec() if point is not None else None
    amax = point.new_amax(dactivation_mf.device) if point is not None else None
    found = swiglu_backward(
        dactivation_mf,
        activated.gate_up,
        quantize=spec,
        activation_spec=activated.spec,
        amax=amax,
    )
    dgate_up = found.dgate_up
    if isinstance(dgate_up, torch.Tensor):
        if point is not None:
            dgate_up = quantize(dgate_up, point.spec_for(dgate_up, amax))
        else:
            dgate_up = formats.fc1.gradient_operand(dgate_up)
    activation = activated.kept if activated.kept is not None else found.activation
    assert activation is not None, "kept, or made again"
    return dgate_up, activation
