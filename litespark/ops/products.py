"""The matrix products of a linear layer, in BF16 and FP8.

With tokens x [m, k], weight w [n, k] and output y [m, n]:

    forward          y  = x  w^T
    input gradient   dx = dy w
    weight gradient  dw += dy^T x     accumulated in fp32 over the micro-batches

cuBLAS does all three; on Hopper its FP8 kernels want both operands with the inner dimension
contiguous, so that the FP8 functions here take a [m, k] and b [n, k] and return a b^T, and callers
hand in transposes.  `cublaslt.py` adds into fp32 in the product's epilogue and picks the fastest of
cuBLAS' algorithms; without it torch's own entry points are used, at the price of one more pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litespark.ops import cublaslt
from litespark.ops.formats import Fp8Matrix, QuantizeSpec
from litespark.ops.quantize import quantize


def fp8_product(
    a_mk: Tensor,
    b_nk: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    *,
    add_mn: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulate: bool = False,
) -> Tensor:
    """a b^T (+ add) of two FP8 matrices, [m, n] in `out_dtype`; the scales are fp32 [1].

    `fast_accumulate` keeps the tensor cores' 14-bit partial sums over the whole inner dimension
    instead of promoting them to fp32 every 128 elements.
    """
    if not a_mk.is_cuda:
        product_mn = _fp8_product_reference(a_mk, b_nk, a_scale_inv, b_scale_inv)
        return (product_mn if add_mn is None else product_mn + add_mn).to(out_dtype)
    out_mn = a_mk.new_empty((a_mk.size(0), b_nk.size(0)), dtype=out_dtype)
    if cublaslt.is_available() and cublaslt.supports(a_mk, b_nk, out_mn):
        scales = cublaslt.Scales(a_scale_inv, b_scale_inv)
        return cublaslt.matmul(
            a_mk, b_nk, out_mn, add_mn=add_mn, scales=scales, fast_accumulate=fast_accumulate
        )
    product_mn = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a_mk,
        b_nk.t(),
        a_scale_inv.reshape(()),
        b_scale_inv.reshape(()),
        out_dtype=out_dtype,
        use_fast_accum=fast_accumulate,
    )
    return product_mn if add_mn is None else product_mn.add_(add_mn)


def fp8_product_quantized(
    a_mk: Tensor, b_nk: Tensor, a_scale_inv: Tensor, b_scale_inv: Tensor, spec: QuantizeSpec
) -> Fp8Matrix:
    """a b^T of two FP8 matrices, with fast accumulation, written in FP8: rows [m, n] alone."""
    out_mn = a_mk.new_empty((a_mk.size(0), b_nk.size(0)), dtype=spec.dtype)
    if a_mk.is_cuda and cublaslt.is_available() and cublaslt.supports(a_mk, b_nk, out_mn):
        scales = cublaslt.Scales(a_scale_inv, b_scale_inv, spec.scale, spec.amax)
        cublaslt.matmul(a_mk, b_nk, out_mn, scales=scales, fast_accumulate=True)
        return Fp8Matrix(out_mn, None, spec.scale_inv)
    exact_mn = fp8_product(
        a_mk, b_nk, a_scale_inv, b_scale_inv, out_dtype=torch.float32, fast_accumulate=True
    )
    return quantize(exact_mn, spec, columns=False)


def product(a_mk: Tensor, b_nk: Tensor, add_mn: Tensor | None = None) -> Tensor:
    """a b^T (+ add), [m, n] in the operands' dtype, BF16 or fp32; either may be a transposed view.

    So y = product(x, w) and dx = product(dy, w.t()).
    """
    out_mn = _tuned(a_mk, b_nk, a_mk.dtype, add_mn)
    if out_mn is not None:
        return out_mn
    out_mn = a_mk @ b_nk.t()
    return out_mn if add_mn is None else out_mn.add_(add_mn)


def _tuned(
    a_mk: Tensor, b_nk: Tensor, out_dtype: torch.dtype, add_mn: Tensor | None
) -> Tensor | None:
    """The product through cuBLASLt; None where it does not take the operands."""
    if not (a_mk.is_cuda and cublaslt.is_available()):
        return None
    out_mn = a_mk.new_empty((a_mk.size(0), b_nk.size(0)), dtype=out_dtype)
    if not cublaslt.supports(a_mk, b_nk, out_mn):
        return None
    return cublaslt.matmul(a_mk, b_nk, out_mn, add_mn=add_mn)


def fp8_product_added(
    a_mk: Tensor,
    b_nk: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    out_mn: Tensor,
    *,
    fast_accumulate: bool = False,
) -> None:
    """out += a b^T of two FP8 matrices, with `out` fp32 [m, n]."""
    if a_mk.is_cuda and cublaslt.is_available() and cublaslt.supports(a_mk, b_nk, out_mn):
        scales = cublaslt.Scales(a_scale_inv, b_scale_inv)
        cublaslt.matmul(
            a_mk, b_nk, out_mn, add_mn=out_mn, scales=scales, fast_accumulate=fast_accumulate
        )
        return
    out_mn += fp8_product(
        a_mk,
        b_nk,
        a_scale_inv,
        b_scale_inv,
        out_dtype=torch.float32,
        fast_accumulate=fast_accumulate,
    )


def _fp8_product_reference(
    a_mk: Tensor, b_nk: Tensor, a_scale_inv: Tensor, b_scale_inv: Tensor
) -> Tensor:
    return (a_mk.float() @ b_nk.float().t()) * (a_scale_inv * b_scale_inv)


def weight_gradient_added(dy_mn: Tensor, x_mk: Tensor, out_nk: Tensor) -> None:
    """out += dy^T x with fp32 accumulation; dy and x BF16 or fp32, `out` fp32 [n, k]."""
    if not dy_mn.is_cuda:
        out_nk += dy_mn.float().t() @ x_mk.float()
    elif dy_mn.dtype == torch.float32:
        out_nk.addmm_(dy_mn.t(), x_mk)
    elif cublaslt.is_available() and cublaslt.supports(dy_mn.t(), x_mk.t(), out_nk):
        cublaslt.matmul(dy_mn.t(), x_mk.t(), out_nk, add_mn=out_nk)
    else:
        torch.addmm(out_nk, dy_mn.t(), x_mk, out_dtype=torch.float32, out=out_nk)
