"""Continues a sequence of tokens, one token at a time.

The prompt is computed in one pass; its keys and values stay in megatron-core's inference context,
so that each further token costs one pass over one position.  Sampling is done in float64 on the
CPU, from a generator of its own: the same seed gives the same text on every device that computes
the same logits.

Shapes: b micro-batch (1 here), v vocabulary with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from litespark.errors import UserError
from litespark.models.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most probable token (greedy).
        top_k: only the k most probable tokens are drawn from; None: all.
        top_p: only the most probable tokens that together reach this probability; None: all.
        seed: seed of the draws.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature}", "is out of range", "Give 0 (greedy) or more."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}", "is out of range", "Give 0 or more, below 2**63.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}", "leaves no token", "Give 1 or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}", "is out of range", "Give more than 0, up to 1.")


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
) -> list[int]:
    """The tokens that follow `prompt`, without the EOS token that may have ended them.

    Args:
        model: the whole model in this process (TP1, PP1), in evaluation mode.
        prompt: token ids; at least one.
        max_new_tokens: how many tokens to give at most.
        sampling: how to choose among the next tokens.
        eos_id: generation stops at this token; None: never.

    Raises:
        UserError: the prompt is empty, too long, or holds ids that the model has not.
    """
    _check_lengths(model, prompt, max_new_tokens)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    context = StaticInferenceContext(1, len(prompt) + max_new_tokens)
    new_ids: list[int] = []
    ids_bs = torch.tensor([list(prompt)], device=device)
    while len(new_ids) < max_new_tokens:
        start = context.sequence_len_offset
        positions_bs = torch.arange(start, start + ids_bs.size(1), device=device)[None]
        logits_b1v = model(
            ids_bs, positions_bs, None, inference_context=context, runtime_gather_output=True
        )
        context.increment_sequence_len_offset(ids_bs.size(1))
        context.enable_decode_mode()
        chosen = choose(model.mask_padding(logits_b1v)[0, -1], sampling, generator)
        if chosen == eos_id:
            break
        new_ids.append(chosen)
        ids_bs = torch.tensor([[chosen]], device=device)
    return new_ids


def choose(logits_v: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose one token by its logits; ids at -inf are never taken."""
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    weights_v = probabilities(logits_v.double().cpu(), sampling)
    return int(torch.multinomial(weights_v, 1, generator=generator))


def probabilities(logits_v: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from: softmax(logits / temperature), cut by top-k, then by top-p; fp64 [v].

    top-p (Holtzman et al. 2020, section 3.1) keeps the smallest set of most probable tokens whose
    probability reaches p; it always holds at least one.
    """
    # The largest becomes 0, so that a small temperature cannot overflow.
    scaled_v = (logits_v - logits_v.max()) / sampling.temperature
    sorted_v, order_v = scaled_v.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        sorted_v[sampling.top_k :] = float("-inf")
    probabilities_v = sorted_v.softmax(dim=0)
    if sampling.top_p is not None:
        before_v = probabilities_v.cumsum(dim=0) - probabilities_v
        probabilities_v = probabilities_v.masked_fill(before_v >= sampling.top_p, 0.0)
        probabilities_v /= probabilities_v.sum()
    return torch.zeros_like(probabilities_v).scatter(0, order_v, probabilities_v)


def _check_lengths(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> None:
    longest = model.max_sequence_length
    if not prompt:
        raise UserError("prompt", "is empty", "Give at least one token to continue.")
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens {max_new_tokens}", "is too small", "Give 1 or more.")
    if len(prompt) >= longest:
        raise UserError(
            f"prompt of {len(prompt)} tokens",
            f"leaves no room: the model's longest sequence is {longest} tokens",
            "Shorten the prompt.",
        )
    if len(prompt) + max_new_tokens > longest:
        raise UserError(
            f"max-new-tokens {max_new_tokens}",
            f"after a prompt of {len(prompt)} tokens is more than the model's longest sequence, "
            f"{longest} tokens",
            f"Give at most {longest - len(prompt)}.",
        )
    unknown = [number for number in prompt if not 0 <= number < model.num_real_tokens]
    if unknown:
        raise UserError(
            f"token {unknown[0]} in the prompt",
            f"is not in the model's vocabulary of {model.num_real_tokens}",
            "Give the tokenizer that the model was trained with.",
        )
