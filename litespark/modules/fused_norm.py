"""RMSNorm through the fused kernels, for the norm that stands alone: the final one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litespark.modules.norm import RMSNorm
from litespark.ops.rms_norm import add_rms_norm, rms_norm_backward


class FusedRMSNorm(RMSNorm):
    """RMSNorm whose backward reads its input once; the fused layers use only its weight."""

    def forward(self, hidden_sbh: Tensor) -> Tensor:
        """Normalise the last dimension; [s, b, h] in and out, dtype kept."""
        return _RmsNorm.apply(hidden_sbh, self.weight, self.eps)  # type: ignore[return-value]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_sbh: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        hidden_mh = hidden_sbh.reshape(-1, hidden_sbh.size(-1))
        output = add_rms_norm(hidden_mh, None, weight_h, eps)
        ctx.save_for_backward(output.summed_mh, weight_h, output.rstd_m)
        assert isinstance(output.normed, torch.Tensor)
        return output.normed.view(hidden_sbh.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        summed_mh, weight_h, rstd_m = ctx.saved_tensors
        dnormed_mh = gradients[0].reshape(summed_mh.shape).contiguous()
        found = rms_norm_backward(dnormed_mh, summed_mh, weight_h, rstd_m)
        dhidden = found.dsummed_mh.view(gradients[0].shape)
        return dhidden, found.dweight_h.to(weight_h.dtype), None
