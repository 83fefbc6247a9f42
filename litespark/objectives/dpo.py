"""Preference optimisation: the forward step, from packed pairs to the loss of a micro-batch.

The head gives each token's cross-entropy, which is minus its log-probability, without gathering the
vocabulary (each tensor-parallel rank has the statistics of its shard).  The answers' sums are taken
over documents, and over context-parallel ranks, which hold parts of them; the loss is a function of
these sums (`preferences.py`).  Losses are summed over pairs and divided once, by the number of
pairs of the global batch.

Legend: n answers of the micro-batch, p = n / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from litespark.config.post_training import DpoConfig
from litespark.errors import LitesparkError
from litespark.objectives.language_modelling import ForwardStep, LanguageBatch, parts_on_device
from litespark.objectives.preferences import METRICS, preference_terms


class PairBatch(LanguageBatch, Protocol):
    """A micro-batch of packed pairs.

    `document_of_bs` int64 [b, s]: which answer a label belongs to, else -1; `documents` int64 [n];
    `reference_logps` fp32 [n], None where the reference has not been asked.
    """

    document_of_bs: Tensor | None
    documents: Tensor | None
    reference_logps: Tensor | None


def answer_sums(
    losses_bs: Tensor, document_of_bs: Tensor, num_answers: int
) -> tuple[Tensor, Tensor]:
    """Log-probability and number of tokens of each answer, fp32 [n] both, over all ranks' parts.

    `losses_bs` fp32 are cross-entropies by token, differentiable; `document_of_bs` says whose.
    """
    counts = document_of_bs >= 0
    owners = document_of_bs.where(counts, num_answers).flatten()  # the last place takes the rest
    sums = losses_bs.new_zeros(num_answers + 1, dtype=torch.float32)
    logps_n = -sums.index_add(0, owners, losses_bs.float().flatten())[:num_answers]
    tokens_n = sums.index_add(0, owners, counts.float().flatten())[:num_answers]
    group: Any = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        both = reduce_from_tensor_model_parallel_region(torch.stack([logps_n, tokens_n]), group)
        logps_n, tokens_n = both.unbind()
    return logps_n, tokens_n


def dpo_step(device: torch.device, options: DpoConfig) -> ForwardStep:
    """The forward step of preference optimisation on `device`."""

    def forward_step(batches: Iterator[Any], model: torch.nn.Module) -> Any:
        batch: PairBatch = next(batches)
        losses_bs, document_of_bs = token_losses(batch, model, device)
        if batch.documents is None:
            raise LitesparkError("preference optimisation was given a batch of plain text")
        reference_n = batch.reference_logps
        return losses_bs, partial(_loss, document_of_bs, len(batch.documents), reference_n, options)

    return forward_step


def answers_step(device: torch.device) -> ForwardStep:
    """A forward step that reports `logps_n` of a micro-batch and has no loss, for a reference."""

    def forward_step(batches: Iterator[Any], model: torch.nn.Module) -> Any:
        batch: PairBatch = next(batches)
        losses_bs, document_of_bs = token_losses(batch, model, device)
        assert batch.documents is not None, "pairs are read from shards of pairs"
        return losses_bs, partial(_report, document_of_bs, len(batch.documents))

    return forward_step


def token_losses(
    batch: PairBatch, model: torch.nn.Module, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the model returns, on the last stage each token's cross-entropy; and whose labels."""
    if batch.document_of_bs is None:
        raise LitesparkError("preference optimisation was given a batch of plain text")
    parts, packed_seq_params = parts_on_device(batch, device, document_of=batch.document_of_bs)
    output = model(
        parts["tokens"],
        parts["position_ids"],
        None,
        labels=parts["labels"],
        packed_seq_params=packed_seq_params,
    )
    return output, parts["document_of"]


def _loss(
    document_of_bs: Tensor,
    num_answers: int,
    reference_logps_n: Tensor | None,
    options: DpoConfig,
    losses_bs: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    if reference_logps_n is None:
        raise LitesparkError("preference optimisation needs the reference's log-probabilities")
    logps_n, tokens_n = answer_sums(losses_bs, document_of_bs, num_answers)
    reference_n = reference_logps_n.to(logps_n.device, non_blocking=True)
    terms = preference_terms(logps_n, reference_n, tokens_n, options)
    loss = terms.losses_p.sum()
    # Context-parallel ranks compute the same loss, each with the gradient of its own tokens; the
    # pairs are counted by the first of them.
    is_counted = parallel_state.get_context_parallel_rank() == 0
    counted = num_answers // 2 if is_counted else 0
    num_pairs = torch.full((), counted, dtype=torch.int, device=loss.device)  # waits for nothing
    report = torch.cat(
        [
            torch.stack([loss.detach().double(), num_pairs.double()]),
            terms.metrics_mp.double().sum(dim=1),
        ]
    )
    assert len(report) == 2 + len(METRICS)
    return loss, num_pairs, {"loss_and_tokens": report * is_counted}


def _report(
    document_of_bs: Tensor, num_answers: int, losses_bs: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logps_n, tokens_n = answer_sums(losses_bs, document_of_bs, num_answers)
    return losses_bs.sum() * 0.0, tokens_n.sum().int(), {"logps_n": logps_n}
