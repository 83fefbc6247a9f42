"""Next-token prediction.

With document masks (a batch with `cu_seqlens`) the rows of a micro-batch are joined into one of
b * s tokens, which changes nothing, because no document runs over the end of a row: attention sees
one sequence of documents, and each token has its own place in its document for RoPE.  Context
parallelism cuts that one row.  All stages of a pipeline then need the batch, not only the first and
the last.

Losses are summed over tokens and divided once, by the number of tokens of the whole global batch:
only then is the result independent of how the batch is cut into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.modules.documents import document_bounds


class LanguageBatch(Protocol):
    """One micro-batch; tokens_bs, labels_bs, position_ids_bs int64, loss_mask_bs fp32, [b, s].

    `cu_seqlens` int32 [documents + 1], on the CPU: where documents begin with the rows one after
    another; None without document masks.
    """

    tokens_bs: Tensor
    labels_bs: Tensor
    position_ids_bs: Tensor
    loss_mask_bs: Tensor
    cu_seqlens: Tensor | None
    longest_document_tokens: int


# megatron-core's contract: the loss to differentiate, the token count, what to report.
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
ForwardStep = Callable[
    [Iterator[LanguageBatch | None], torch.nn.Module], tuple[Tensor, LossFunction]
]


def language_modelling_step(device: torch.device) -> ForwardStep:
    """The forward step of language modelling on `device`.

    Stages in the middle of a pipeline see neither tokens nor labels: without document masks they
    are given None.
    """

    def forward_step(
        batches: Iterator[LanguageBatch | None], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        if batch is None:
            return model(None, None, None, labels=None), _no_loss_here
        parts, packed_seq_params = parts_on_device(batch, device, loss_mask=batch.loss_mask_bs)
        output = model(
            parts["tokens"],
            parts["position_ids"],
            None,
            labels=parts["labels"],
            loss_mask=parts["loss_mask"],
            packed_seq_params=packed_seq_params,
        )
        return output, partial(token_sum, parts["loss_mask"])

    return forward_step


def parts_on_device(
    batch: LanguageBatch, device: torch.device, **more: Tensor
) -> tuple[dict[str, Any], PackedSeqParams | None]:
    """This context-parallel rank's part of a batch, [b, s] each, and where documents begin.

    `tokens`, `labels`, `position_ids`, and what else is named in `more`.  With document masks the
    rows are joined, [1, b s].
    """
    parts: dict[str, Any] = {
        "tokens": batch.tokens_bs,
        "labels": batch.labels_bs,
        "position_ids": batch.position_ids_bs,
        **more,
    }
    parts = {name: part.to(device, non_blocking=True) for name, part in parts.items()}
    packed_seq_params = None
    if batch.cu_seqlens is not None:
        parts = {name: part.view(1, -1) for name, part in parts.items()}
        packed_seq_params = document_bounds(
            batch.cu_seqlens,
            batch.longest_document_tokens,
            device,
            context=(
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_context_parallel_world_size(),
            ),
        )
    return get_batch_on_this_cp_rank(parts), packed_seq_params


def _no_loss_here(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    raise LitesparkError("the schedule asked a stage without labels for its loss")


def token_sum(loss_mask_bs: Tensor, loss_sum: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of the losses where the mask is 1, the number of such tokens, and both to report."""
    num_tokens = loss_mask_bs.sum()
    report = torch.stack([loss_sum.detach().double(), num_tokens.double()])
    return loss_sum, num_tokens.to(torch.int), {"loss_and_tokens": report}
