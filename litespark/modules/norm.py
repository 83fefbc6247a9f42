"""RMSNorm for megatron-core's norm slots.

megatron-core's own torch norm refuses sequence parallelism, although all that it asks of a norm is
a mark on the weight: under sequence parallelism each rank sees only its part of the tokens, so the
weight's gradient must be summed over the tensor-parallel ranks (`finalize_model_grads`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, eq. 4), computed in fp32.

    Args:
        config: megatron-core's configuration; `sequence_parallel` and `params_dtype` are read.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()  # the CPU where the CPU patches are applied
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_sbh: Tensor) -> Tensor:
        """Normalise the last dimension; [s, b, h] in and out, dtype kept."""
        return F.rms_norm(hidden_sbh, (hidden_sbh.size(-1),), self.weight, self.eps)
