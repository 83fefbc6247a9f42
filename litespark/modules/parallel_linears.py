"""The tensor-parallel linears of the two blocks: with the norm before the first of them.

Both blocks begin with [residual add,] RMSNorm and a linear, and end their backward with that
linear's input gradient and the norm's.  Where the linear's format has a scale beforehand the norm
writes FP8, both ways round, in its own pass; under sequence parallelism FP8 rows are what is
gathered, half the bytes of BF16, and the transpose is made after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litespark.fp8.linear import LinearFormat, Operand, keep_for_weight_gradient
from litespark.modules.exchange import Exchange
from litespark.modules.low_rank import adapted_weight
from litespark.ops.formats import Fp8Matrix, QuantizeSpec
from litespark.ops.quantize import quantize, transpose
from litespark.ops.rms_norm import add_rms_norm, recompute_normed, rms_norm_backward
from litespark.ops.weight_gradient import deliver_weight_gradient


def weight_of(module: Any) -> torch.nn.Parameter:
    """The weight of a module that megatron-core's types know only as something callable.

    Of a linear with a low-rank adapter the sum of both, which has a gradient of its own.
    """
    return adapted_weight(module)


@dataclass
class NormLinearSaved:
    """What backward needs.

    `operand` is the linear's input, or, where tokens are split, what this rank's part of it is
    gathered from again: its FP8 rows, or None to compute it from the sum.
    """

    summed_mh: Tensor
    rstd_m: Tensor
    operand: Operand | None


class NormLinear:
    """y = linear(rms_norm(x + residual)), with the gradient of both.

    Args:
        linear: the number format of the linear.
        exchange: between the tensor-parallel ranks.
        eps: of the norm.
    """

    def __init__(self, linear: LinearFormat, exchange: Exchange, eps: float) -> None:
        self.linear = linear
        self.exchange = exchange
        self.eps = eps

    def forward(
        self,
        x_mh: Tensor,
        residual_mh: Tensor | None,
        norm_weight_h: Tensor,
        weight_nh: Tensor,
        *,
        needs_gradient: bool,
        output_spec: QuantizeSpec | None = None,
    ) -> tuple[Tensor | Fp8Matrix, NormLinearSaved]:
        """The linear's output [m, n], tokens of all ranks, and what backward needs.

        With `output_spec` the output is in FP8, rows alone.
        """
        point = self.linear.input_point()
        spec = point.spec() if point is not None else None
        splits = self.exchange.splits_tokens
        keeps = needs_gradient and not splits
        # A largest value over this rank's tokens alone would not do where they are split.
        amax = point.new_amax(x_mh.device) if point is not None and not splits else None
        norm = add_rms_norm(
            x_mh,
            residual_mh,
            norm_weight_h,
            self.eps,
            quantize=spec,
            columns=keeps,
            amax=amax,
        )
        operand = self._operand(norm.normed, amax, rows=True, columns=keeps)
        if output_spec is None:
            output_mn = self.linear.forward(operand, weight_nh)
        else:
            output_mn = self.linear.forward_quantized(operand, weight_nh, output_spec)
        kept = None
        if keeps:
            kept = keep_for_weight_gradient(operand)
        elif isinstance(norm.normed, Fp8Matrix):
            kept = norm.normed
        return output_mn, NormLinearSaved(norm.summed_mh, norm.rstd_m, kept)

    def backward(
        self,
        doutput: Operand,
        saved: NormLinearSaved,
        norm_weight_h: Tensor,
        weight_nh: Tensor,
        dsummed_mh: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the sum (`dsummed_mh`, what arrives past the block, included), of the
        norm's weight and of the linear's.
        """
        # Collectives run one after the other: the gather goes behind the first product, so that
        # the reduction has the second one to itself.
        operand = self._start_operand_again(saved, norm_weight_h)
        dinput_mh = self.linear.input_gradient(doutput, weight_nh)
        again = operand()
        finish = self.exchange.start_reduce(dinput_mh)
        dweight = self.linear.weight_gradient(doutput, again, weight_nh)
        saved.operand = None
        gradients = rms_norm_backward(
            finish(), saved.summed_mh, norm_weight_h, saved.rstd_m, dsummed_mh=dsummed_mh
        )
        dnorm_weight = deliver_weight_gradient(norm_weight_h, gradients.dweight_h)
        return gradients.dsummed_mh, dnorm_weight, dweight

    def _operand(
        self, normed: Tensor | Fp8Matrix, amax: Tensor | None, *, rows: bool, columns: bool
    ) -> Operand:
        """The linear's input from what the norm wrote, tokens of all ranks."""
        return self._start_operand(normed, amax, rows=rows, columns=columns)()

    def _start_operand(
        self, normed: Tensor | Fp8Matrix, amax: Tensor | None, *, rows: bool, columns: bool
    ) -> Callable[[], Operand]:
        """Start the exchange that `_operand` needs; the operand is what is returned returns."""
        if isinstance(normed, Fp8Matrix):
            if not self.exchange.splits_tokens:
                return lambda: normed
            assert normed.rows_mk is not None
            gathered_rows = self.exchange.start_gather(normed.rows_mk)

            def finish_fp8() -> Operand:
                rows_mk = gathered_rows()
                columns_km = transpose(rows_mk) if columns else None
                return Fp8Matrix(rows_mk, columns_km, normed.scale_inv)

            return finish_fp8
        gathered = self.exchange.start_gather(normed)

        def finish() -> Operand:
            full_mh = gathered()
            point = self.linear.input_point()
            if point is not None:
                return quantize(full_mh, point.spec_for(full_mh, amax), rows=rows, columns=columns)
            return self.linear.input_operand(full_mh, rows=rows, columns=columns)

        return finish

    def _start_operand_again(
        self, saved: NormLinearSaved, norm_weight_h: Tensor
    ) -> Callable[[], Operand]:
        """Start to make the linear's input for its weight's gradient; what returns it."""
        if not self.exchange.splits_tokens:
            kept = saved.operand
            assert kept is not None, "kept by forward"
            return lambda: kept
        if isinstance(saved.operand, Fp8Matrix):
            return self._start_operand(saved.operand, None, rows=False, columns=True)
        normed = recompute_normed(saved.summed_mh, norm_weight_h, saved.rstd_m)
        return self._start_operand(normed, None, rows=False, columns=True)


def gathered_gradient(linear: LinearFormat, exchange: Exchange, doutput_mn: Tensor) -> Operand:
    """The gradient of a row-parallel linear's output as an operand, tokens of all ranks."""
    point = linear.gradient_point()
    spec = point.spec() if point is not None else None
    if spec is None or not exchange.splits_tokens:
        return linear.gradient_operand(exchange.gather(doutput_mn))
    local = quantize(doutput_mn, spec, columns=False)
    assert local.rows_mk is not None
    rows_mk = exchange.gather(local.rows_mk)
    return Fp8Matrix(rows_mk, transpose(rows_mk), local.scale_inv)
