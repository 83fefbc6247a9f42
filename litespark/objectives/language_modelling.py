"""Next-token prediction.

Losses are summed over tokens and divided once, by the number of tokens of the whole global batch:
only then is the result independent of how the batch is cut into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from litespark.errors import LitesparkError


class LanguageBatch(Protocol):
    """One micro-batch; tokens_bs, labels_bs, position_ids_bs int64, loss_mask_bs fp32, [b, s]."""

    tokens_bs: Tensor
    labels_bs: Tensor
    position_ids_bs: Tensor
    loss_mask_bs: Tensor


# megatron-core's contract: the loss to differentiate, the token count, what to report.
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
ForwardStep = Callable[
    [Iterator[LanguageBatch | None], torch.nn.Module], tuple[Tensor, LossFunction]
]


def language_modelling_step(device: torch.device) -> ForwardStep:
    """The forward step of language modelling on `device`.

    Stages in the middle of a pipeline see neither tokens nor labels: they are given None.
    """

    def forward_step(
        batches: Iterator[LanguageBatch | None], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        if batch is None:
            return model(None, None, None, labels=None), _no_loss_here
        parts: dict[str, Any] = {
            "tokens": batch.tokens_bs,
            "labels": batch.labels_bs,
            "position_ids": batch.position_ids_bs,
            "loss_mask": batch.loss_mask_bs,
        }
        parts = {name: part.to(device, non_blocking=True) for name, part in parts.items()}
        parts = get_batch_on_this_cp_rank(parts)
        output = model(
            parts["tokens"],
            parts["position_ids"],
            None,
            labels=parts["labels"],
            loss_mask=parts["loss_mask"],
        )
        return output, partial(token_sum, parts["loss_mask"])

    return forward_step


def _no_loss_here(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    raise LitesparkError("the schedule asked a stage without labels for its loss")


def token_sum(loss_mask_bs: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of the losses where the mask is 1, the number of such tokens, and both to report."""
    num_tokens = loss_mask_bs.sum()
    report = torch.stack([loss_sum.detach().double(), num_tokens.double()])
    return loss_sum, num_tokens.to(torch.int), {"loss_and_tokens": report}
