"""One matrix product in cuBLASLt's terms: how its matrices lie in memory, and what is possible.

All of this follows from shapes, strides, types and addresses, without a device.  What the library
can multiply and store: cuBLAS documentation, `cublasLtMatmul()`, the tables of types and the
demands of FP8 kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.ops import cublaslt_library as lt
from litespark.ops.formats import E4M3, E5M2, FP8_MAX

# What a product may be stored as.  E5M2 x E5M2 does not exist, nor does E5M2 from E4M3 alone.
OUTPUTS = {
    (torch.bfloat16, torch.bfloat16): (torch.bfloat16, torch.float32),
    (E4M3, E4M3): (torch.bfloat16, torch.float32, E4M3),
    (E4M3, E5M2): (torch.bfloat16, torch.float32, E4M3, E5M2),
    (E5M2, E4M3): (torch.bfloat16, torch.float32, E4M3, E5M2),
}

Addresses = tuple[int, int, int, int]  # of cuBLASLt's A, B, C and D


@dataclass(frozen=True)
class Scales:
    """The factors of an FP8 product, each fp32 [1] on the operands' device, read there.

    `a_scale_inv` and `b_scale_inv` multiply the operands (value = stored * scale_inv).  For an FP8
    output: `out_scale` multiplies the sum before it is stored, and `out_amax` is raised to the
    largest |value| of the sum, product plus `add_mn`, before `out_scale`.  (cuBLASLt overwrites
    where it reports; that is a scratch here, and a second small kernel raises `out_amax`.)

    Raises:
        LitesparkError: a factor is not one fp32 element, or they are on different devices.
    """

    a_scale_inv: Tensor
    b_scale_inv: Tensor
    out_scale: Tensor | None = None
    out_amax: Tensor | None = None

    def __post_init__(self) -> None:
        device = self.a_scale_inv.get_device()
        for factor in (self.a_scale_inv, self.b_scale_inv, self.out_scale, self.out_amax):
            if factor is None:
                continue
            if factor.dtype != torch.float32 or factor.numel() != 1:
                raise LitesparkError(f"a scale or amax is fp32 [1], not {_text(factor)}")
            if factor.get_device() != device:
                raise LitesparkError("the scales and amax of one product are on different devices")

    def kind(self) -> tuple[int, bool, bool]:
        """The device, and which of the optional factors are there."""
        device = self.a_scale_inv.get_device()
        return device, self.out_scale is not None, self.out_amax is not None


class Stored(NamedTuple):
    """A matrix as cuBLASLt sees its memory: [rows, cols] with columns `ld` elements apart.

    `transposed`: the tensor is row-major, so that it is the transpose of what cuBLASLt sees.
    """

    rows: int
    cols: int
    ld: int
    transposed: bool


def stored(matrix: Tensor) -> Stored | None:
    """How `matrix`, 2-D, lies in memory; None if neither its rows nor its columns are contiguous.

    The stride of a dimension of size 1 says nothing and is not looked at.
    """
    rows, cols = matrix.shape
    row_stride, col_stride = matrix.stride()
    if (col_stride == 1 or cols == 1) and (rows == 1 or row_stride >= cols):
        return Stored(cols, rows, row_stride if rows > 1 else cols, transposed=True)
    if (row_stride == 1 or rows == 1) and (cols == 1 or col_stride >= rows):
        return Stored(rows, cols, col_stride if cols > 1 else rows, transposed=False)
    return None


def layout_of(matrix: Tensor) -> Stored:
    """`stored` of a matrix that `find_problem` has passed."""
    seen = stored(matrix)
    assert seen is not None, "_layout_problem refuses such a matrix"
    return seen


def operations(a_mk: Tensor, b_nk: Tensor) -> tuple[int, int]:
    """cuBLASLt's transa and transb: op(A) is b [n, k] and op(B) is a^T [k, m]."""
    transa = lt.OP_T if layout_of(b_nk).transposed else lt.OP_N
    transb = lt.OP_N if layout_of(a_mk).transposed else lt.OP_T
    return transa, transb


def alignment(addresses: Addresses) -> int:
    """The power of two that divides all addresses, at most the 16 bytes of the widest access."""
    bits = (addresses[0] | addresses[1] | addresses[2] | addresses[3]) & 15
    return bits & -bits or 16


def name_of(dtype: torch.dtype) -> str:
    """The type's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def _text(tensor: Tensor) -> str:
    """Type and shape for a message; strides where they are not the usual ones."""
    strides = "" if tensor.is_contiguous() else f" strides {list(tensor.stride())}"
    return f"{name_of(tensor.dtype)} {list(tensor.shape)}{strides}"


def _shape_problem(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None) -> str | None:
    if not a.dim() == b.dim() == out.dim() == 2:
        return "all matrices have two dimensions"
    if a.shape[1] != b.shape[1] or out.shape != (a.shape[0], b.shape[0]):
        return "the shapes are not [m, k], [n, k] and [m, n]"
    if add is not None and add.shape != out.shape:
        return "add has not out's shape"
    if 0 in (*a.shape, *b.shape):
        return "a size is 0"
    if any(t is not None and t.get_device() != a.get_device() for t in (b, out, add)):
        return "the matrices are on different devices"
    return None


def _dtype_problem(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None) -> str | None:
    outputs = OUTPUTS.get((a.dtype, b.dtype))
    if outputs is None:
        return "operands are both bfloat16, or both FP8 and not both E5M2"
    if out.dtype not in outputs:
        return f"the output of these is one of {', '.join(map(name_of, outputs))}"
    if add is not None and add.dtype != (torch.bfloat16 if out.dtype in FP8_MAX else out.dtype):
        return "add has out's type, or bfloat16 where out is FP8"
    return None


def _layout_problem(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None) -> str | None:
    operands = [stored(a), stored(b)]
    results = [stored(out)] if add is None else [stored(out), stored(add)]
    if None in operands:
        return "an operand's rows or its columns must be contiguous"
    if any(result is None or not result.transposed for result in results):
        return "the rows of out and add must be contiguous"
    if (
        add is not None
        and add.data_ptr() == out.data_ptr()
        and (add.dtype != out.dtype or results[0] != results[1])
    ):
        return "add shares out's memory but not its type and layout"
    if a.dtype not in FP8_MAX:
        return None
    if not all(operand is not None and operand.transposed for operand in operands):
        return "FP8 operands must be contiguous along k"
    sizes = [a.shape[1], b.shape[0], *(seen.ld for seen in (*operands, *results) if seen)]
    addresses = [matrix.data_ptr() for matrix in (a, b, out, add) if matrix is not None]
    if any(number % 16 for number in (*sizes, *addresses)):
        return "FP8 needs n, k, row strides and addresses that are multiples of 16"
    return None


def find_problem(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None) -> str | None:
    """What cuBLASLt could not do with these, as a clause; None if nothing."""
    return (
        _shape_problem(a, b, out, add)
        or _dtype_problem(a, b, out, add)
        or _layout_problem(a, b, out, add)
    )


def find_scales_problem(a: Tensor, out: Tensor, scales: Scales | None) -> str | None:
    """Why these matrices cannot have these scales, as a clause; None if they can."""
    if scales is None:
        return None
    if a.dtype not in FP8_MAX:
        return "scales are for FP8 operands"
    if scales.a_scale_inv.get_device() != a.get_device():
        return "the scales are on another device"
    if out.dtype not in FP8_MAX and (scales.out_scale is not None or scales.out_amax is not None):
        return "out_scale and out_amax are for an FP8 output"
    return None


class Product(NamedTuple):
    """The arguments of one `matmul`."""

    a: Tensor
    b: Tensor
    out: Tensor
    add: Tensor | None
    scales: Scales | None
    fast: bool

    def addresses(self) -> Addresses:
        """Where cuBLASLt finds its A, B, C and D.

        Without `add` C is not read (beta is 0): it is D, or NULL where D has a type that C cannot
        have.
        """
        out = self.out.data_ptr()
        if self.add is not None:
            return self.b.data_ptr(), self.a.data_ptr(), self.add.data_ptr(), out
        return self.b.data_ptr(), self.a.data_ptr(), 0 if self.out.dtype in FP8_MAX else out, out

    def key(self, addresses: Addresses) -> tuple[object, ...]:
        """The kind of product: all that a plan depends on, and all that is checked for one."""
        a, b, out, add, scales, fast = self
        return (
            (a.dtype, a.shape, a.stride(), a.get_device()),
            (b.dtype, b.shape, b.stride(), b.get_device()),
            (out.dtype, out.shape, out.stride(), out.get_device()),
            None if add is None else (add.dtype, add.shape, add.stride(), add.get_device()),
            None if scales is None else scales.kind(),
            fast,
            addresses[2] == addresses[3],
            alignment(addresses),
        )

    def text(self) -> str:
        """The product for a message."""
        added = "" if self.add is None else f" + {_text(self.add)}"
        in_place = " in place" if self.add is self.out else ""
        return f"({_text(self.a)}) @ ({_text(self.b)})^T{added} -> {_text(self.out)}{in_place}"
