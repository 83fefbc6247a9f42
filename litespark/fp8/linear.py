"""The number format of one linear layer: what its operands are stored in, and its products.

A block computes with *operands*, and does not know their format: it asks the layer's format to
turn a tensor into an operand, or, where a kernel can write the operand itself, for the
`QuantizeSpec` to give to that kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from litespark.fp8.primary import dequantized, primary_spec
from litespark.fp8.scaling import Point, Scaling
from litespark.ops.blockwise import (
    BlockScaledMatrix,
    block_scaled_matmul,
    quantize_blocks,
    quantize_tiles,
)
from litespark.ops.formats import E4M3, E5M2, Fp8Matrix, QuantizeSpec
from litespark.ops.products import (
    fp8_product,
    fp8_product_added,
    fp8_product_quantized,
    product,
    weight_gradient_added,
)
from litespark.ops.quantize import current_scale, quantize, raise_amax, transpose
from litespark.ops.weight_gradient import added_to_main_grad, main_grad_of

Operand = Tensor | Fp8Matrix | BlockScaledMatrix


class LinearFormat(Protocol):
    """What a block needs of a linear layer with weight [n, k], input [m, k], output [m, n]."""

    def refresh(self, weight_nk: Tensor) -> None:
        """Take over the weight after an optimizer step."""
        ...

    def input_point(self) -> Point | None:
        """The point of the input, where one scale serves the whole tensor."""
        ...

    def gradient_point(self) -> Point | None:
        """The point of the output's gradient, likewise."""
        ...

    def input_operand(self, x: Tensor, *, rows: bool = True, columns: bool = True) -> Operand:
        """The input as an operand: rows for forward, columns for the weight's gradient."""
        ...

    def gradient_operand(self, dy: Tensor) -> Operand:
        """The gradient of the output as an operand."""
        ...

    def forward(self, x: Operand, weight_nk: Tensor, add_mn: Tensor | None = None) -> Tensor:
        """x w^T (+ add), [m, n] in the weight's dtype."""
        ...

    def forward_quantized(self, x: Operand, weight_nk: Tensor, spec: QuantizeSpec) -> Fp8Matrix:
        """x w^T written in FP8, rows [m, n]; for formats that have an input point."""
        ...

    def input_gradient(self, dy: Operand, weight_nk: Tensor) -> Tensor:
        """dy w, [m, k] in the weight's dtype."""
        ...

    def weight_gradient(self, dy: Operand, x: Operand, weight_nk: Tensor) -> Tensor:
        """dy^T x, added to the weight's `main_grad`; returns what backward returns."""
        ...


def as_matrix(values: Tensor) -> Tensor:
    """[s, b, ...] or [m, k] as [m, k] without a copy where strides allow it."""
    if values.dim() == 2:
        return values
    return values.flatten(2).reshape(values.size(0) * values.size(1), -1)


class HighPrecision:
    """BF16 or fp32: the operands are the tensors themselves.

    A weight that exists in FP8 alone is made BF16 again for each product: what its rounding took
    away stays away.
    """

    def refresh(self, weight_nk: Tensor) -> None:
        """Nothing is derived from the weight."""

    def input_point(self) -> Point | None:
        """No scale."""
        return None

    def gradient_point(self) -> Point | None:
        """No scale."""
        return None

    def input_operand(self, x: Tensor, *, rows: bool = True, columns: bool = True) -> Operand:
        """The input itself: its products take either order."""
        return as_matrix(x)

    def gradient_operand(self, dy: Tensor) -> Operand:
        """The gradient itself."""
        return as_matrix(dy)

    def forward(self, x: Operand, weight_nk: Tensor, add_mn: Tensor | None = None) -> Tensor:
        """x w^T (+ add), [m, n]."""
        assert isinstance(x, Tensor)
        return product(x, dequantized(weight_nk), add_mn)

    def forward_quantized(self, x: Operand, weight_nk: Tensor, spec: QuantizeSpec) -> Fp8Matrix:
        """x w^T computed as ever, then written in FP8."""
        return quantize(self.forward(x, weight_nk), spec, columns=False)

    def input_gradient(self, dy: Operand, weight_nk: Tensor) -> Tensor:
        """dy w, [m, k]."""
        assert isinstance(dy, Tensor)
        return product(dy, dequantized(weight_nk).t())

    def weight_gradient(self, dy: Operand, x: Operand, weight_nk: Tensor) -> Tensor:
        """dy^T x, accumulated in fp32."""
        assert isinstance(dy, Tensor)
        assert isinstance(x, Tensor)
        main_grad = main_grad_of(weight_nk)
        if main_grad is None:
            return (dy.t() @ x).to(weight_nk.dtype)
        weight_gradient_added(dy, x, main_grad)
        return added_to_main_grad(weight_nk)


class ScaledFp8:
    """FP8 with one scale a tensor, delayed or current: E4M3 forward, E5M2 for gradients.

    The weight has the scale of its own largest value, which costs one pass a step; one that exists
    in FP8 alone has its scale already (`primary.py`), and lacks the transpose only.

    Args:
        scaling: where the points live.
        name: of the layer, the same at every layout.
        fast_gradients: fast accumulation for the gradients' products too.
    """

    def __init__(self, scaling: Scaling, name: str, *, fast_gradients: bool = False) -> None:
        self._input = scaling.point(f"{name}.input", E4M3)
        self._gradient = scaling.point(f"{name}.output_gradient", E5M2)
        self._weight: Fp8Matrix | None = None
        self._fast_gradients = fast_gradients

    def refresh(self, weight_nk: Tensor) -> None:
        """Quantise the weight, both ways round."""
        self._weight = None  # free the old one first
        spec = primary_spec(weight_nk)
        if spec is None:
            self._weight = current_fp8(weight_nk.detach())
            return
        rows_nk = weight_nk.detach()
        self._weight = Fp8Matrix(rows_nk, transpose(rows_nk), spec.scale_inv)

    def input_point(self) -> Point | None:
        """The input's scale."""
        return self._input

    def gradient_point(self) -> Point | None:
        """The output gradient's scale."""
        return self._gradient

    def input_operand(self, x: Tensor, *, rows: bool = True, columns: bool = True) -> Operand:
        """The input in E4M3."""
        return self._input.quantize(x, rows=rows, columns=columns)

    def gradient_operand(self, dy: Tensor) -> Operand:
        """The gradient in E5M2."""
        return self._gradient.quantize(dy)

    def forward(self, x: Operand, weight_nk: Tensor, add_mn: Tensor | None = None) -> Tensor:
        """x w^T (+ add) with fast accumulation, [m, n]."""
        assert isinstance(x, Fp8Matrix)
        assert x.rows_mk is not None
        weight = self._weight_rows()
        assert weight.rows_mk is not None
        return fp8_product(
            x.rows_mk,
            weight.rows_mk,
            x.scale_inv,
            weight.scale_inv,
            add_mn=add_mn,
            out_dtype=_product_dtype(weight_nk),
            fast_accumulate=True,
        )

    def forward_quantized(self, x: Operand, weight_nk: Tensor, spec: QuantizeSpec) -> Fp8Matrix:
        """x w^T, written in FP8 by the product itself."""
        assert isinstance(x, Fp8Matrix)
        assert x.rows_mk is not None
        weight = self._weight_rows()
        assert weight.rows_mk is not None
        return fp8_product_quantized(x.rows_mk, weight.rows_mk, x.scale_inv, weight.scale_inv, spec)

    def input_gradient(self, dy: Operand, weight_nk: Tensor) -> Tensor:
        """dy w, [m, k]."""
        assert isinstance(dy, Fp8Matrix)
        assert dy.rows_mk is not None
        weight = self._weight_rows()
        assert weight.columns_km is not None
        return fp8_product(
            dy.rows_mk,
            weight.columns_km,
            dy.scale_inv,
            weight.scale_inv,
            out_dtype=_product_dtype(weight_nk),
            fast_accumulate=self._fast_gradients,
        )

    def weight_gradient(self, dy: Operand, x: Operand, weight_nk: Tensor) -> Tensor:
        """dy^T x, accumulated in fp32."""
        assert isinstance(dy, Fp8Matrix)
        assert isinstance(x, Fp8Matrix)
        assert dy.columns_km is not None
        assert x.columns_km is not None
        operands = (dy.columns_km, x.columns_km, dy.scale_inv, x.scale_inv)
        main_grad, fast = main_grad_of(weight_nk), self._fast_gradients
        if main_grad is None:
            return fp8_product(*operands, out_dtype=_product_dtype(weight_nk), fast_accumulate=fast)
        fp8_product_added(*operands, main_grad, fast_accumulate=fast)
        return added_to_main_grad(weight_nk)

    def _weight_rows(self) -> Fp8Matrix:
        assert self._weight is not None, "refreshed at the first micro-batch"
        return self._weight


class BlockwiseFp8:
    """FP8 with a scale per 1x128 tile of activations and gradients and per 128x128 of weights.

    All E4M3; powers of two as scales.  Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """

    def __init__(self) -> None:
        self._weight: BlockScaledMatrix | None = None

    def refresh(self, weight_nk: Tensor) -> None:
        """Quantise the weight, both ways round."""
        self._weight = None
        self._weight = quantize_blocks(weight_nk.detach())

    def input_point(self) -> Point | None:
        """No scale for the whole tensor."""
        return None

    def gradient_point(self) -> Point | None:
        """No scale for the whole tensor."""
        return None

    def input_operand(self, x: Tensor, *, rows: bool = True, columns: bool = True) -> Operand:
        """The input in tiles."""
        return quantize_tiles(as_matrix(x), rows=rows, columns=columns)

    def gradient_operand(self, dy: Tensor) -> Operand:
        """The gradient in tiles."""
        return quantize_tiles(as_matrix(dy))

    def forward(self, x: Operand, weight_nk: Tensor, add_mn: Tensor | None = None) -> Tensor:
        """x w^T (+ add), [m, n]."""
        assert isinstance(x, BlockScaledMatrix)
        assert self._weight is not None, "refreshed at the first micro-batch"
        output_mn = block_scaled_matmul(x.rows(), self._weight.rows(), out_dtype=weight_nk.dtype)
        return output_mn if add_mn is None else output_mn.add_(add_mn)

    def forward_quantized(self, x: Operand, weight_nk: Tensor, spec: QuantizeSpec) -> Fp8Matrix:
        """x w^T computed as ever, then written in FP8."""
        return quantize(self.forward(x, weight_nk), spec, columns=False)

    def input_gradient(self, dy: Operand, weight_nk: Tensor) -> Tensor:
        """dy w, [m, k]."""
        assert isinstance(dy, BlockScaledMatrix)
        assert self._weight is not None, "refreshed at the first micro-batch"
        return block_scaled_matmul(dy.rows(), self._weight.columns(), out_dtype=weight_nk.dtype)

    def weight_gradient(self, dy: Operand, x: Operand, weight_nk: Tensor) -> Tensor:
        """dy^T x; the product cannot accumulate, so a pass adds it."""
        assert isinstance(dy, BlockScaledMatrix)
        assert isinstance(x, BlockScaledMatrix)
        product_nk = block_scaled_matmul(dy.columns(), x.columns(), out_dtype=torch.float32)
        main_grad = main_grad_of(weight_nk)
        if main_grad is None:
            return product_nk.to(weight_nk.dtype)
        main_grad.add_(product_nk)
        return added_to_main_grad(weight_nk)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What products with a weight come out in: its own format, BF16 where that is FP8."""
    return torch.bfloat16 if primary_spec(weight) is not None else weight.dtype


def current_fp8(values: Tensor) -> Fp8Matrix:
    """`values` in E4M3 with the scale of their own largest, both ways round."""
    amax = torch.zeros(1, device=values.device)
    raise_amax(values, amax)
    scale, scale_inv = current_scale(amax, E4M3)
    return quantize(values, QuantizeSpec(E4M3, scale, scale_inv, amax))


def keep_for_weight_gradient(operand: Operand) -> Operand:
    """What of a layer's input its weight's gradient needs: the transpose, for FP8."""
    if isinstance(operand, Fp8Matrix):
        return Fp8Matrix(None, operand.columns_km, operand.scale_inv)
    if isinstance(operand, BlockScaledMatrix):
        return replace(operand, rows_mk=None, row_scales=None)
    return operand
