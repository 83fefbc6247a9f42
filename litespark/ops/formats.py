"""FP8 matrices.

Hopper's FP8 matrix products read both operands along the inner dimension: a matrix that is
multiplied from both sides (forward, and its gradient's product) is therefore stored twice, row by
row and transposed.  One scale serves the whole matrix: stored = saturate(value * scale).

E4M3 (largest 448) has the finer steps and holds weights and activations; E5M2 (largest 57344) has
the wider range and holds gradients.  Source: Micikevicius et al. 2022, arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}


@dataclass(frozen=True)
class QuantizeSpec:
    """How a kernel turns what it computed into FP8 with one scale for the whole matrix.

    `scale` and its reciprocal `scale_inv` are fp32 [1], read on the device.  `amax`, fp32 [1], is
    raised to the largest |value| seen, before scaling (NaN and infinity count as they compare).
    """

    dtype: torch.dtype
    scale: Tensor
    scale_inv: Tensor
    amax: Tensor


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix [m, k] in FP8: `rows_mk`, and/or its transpose `columns_km`, both contiguous.

    value = stored * scale_inv, with `scale_inv` fp32 [1].
    """

    rows_mk: Tensor | None
    columns_km: Tensor | None
    scale_inv: Tensor

    def dequantize(self) -> Tensor:
        """The matrix in fp32 [m, k]."""
        if self.rows_mk is not None:
            return self.rows_mk.float() * self.scale_inv
        assert self.columns_km is not None, "one of the two is always there"
        return self.columns_km.float().t() * self.scale_inv


def saturate(values: Tensor, spec: QuantizeSpec) -> Tensor:
    """Reference quantisation: values * scale, clamped to the format's range and rounded to nearest.

    Also raises `spec.amax`.  Same shape, dtype `spec.dtype`.
    """
    values = values.float()
    torch.maximum(spec.amax, values.abs().amax().reshape(1), out=spec.amax)
    limit = FP8_MAX[spec.dtype]
    return (values * spec.scale).clamp(-limit, limit).to(spec.dtype)
