"""Preference losses: functions of the log-probabilities of whole answers, and of nothing else.

With an answer's log-ratio r = log pi(answer) - log pi_ref(answer), of the chosen answer r_c and of
the rejected one r_r, and h = r_c - r_r:

    sigmoid   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
              Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with e > 0 its conservative form
              (Mitchell 2023, "A note on DPO with noisy preferences", equation 5)
    ipo       (h - 1 / (2 beta))^2
              Azar et al. 2023 (arXiv 2310.12036), equation 17, whose tau is beta

Length-normalised, r is divided by the answer's tokens: of `sigmoid` as in Tulu 3 (Lambert et al.
2024, arXiv 2411.15124, section 5.1); of `ipo` it is what its authors used, and what TRL computes.

The reward of an answer is beta r (not normalised: rewards of all variants compare), its margin
r_c - r_r times beta, and a pair is counted as right when its margin is positive.

Legend: p pairs, n = 2 p answers, pair k's chosen one at 2 k and its rejected one at 2 k + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litespark.config.post_training import DpoConfig

METRICS = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
    "kl_estimate",
)


@dataclass(frozen=True)
class PreferenceTerms:
    """`losses_p`, differentiable; `metrics_mp` [5, p], what `METRICS` names, without gradient."""

    losses_p: Tensor
    metrics_mp: Tensor


def preference_terms(
    logps_n: Tensor, reference_logps_n: Tensor, num_tokens_n: Tensor, options: DpoConfig
) -> PreferenceTerms:
    """Losses and metrics of pairs.

    `kl_estimate` is the mean of -r over both answers: the answers' own estimate of the divergence
    KL(reference || policy) of a whole answer, exact in expectation where the reference wrote them.

    Args:
        logps_n: fp32, log-probabilities of whole answers under the policy.
        reference_logps_n: fp32, under the reference.
        num_tokens_n: tokens of each answer.
        options: which loss.
    """
    ratios_n = logps_n - reference_logps_n
    scores_n = ratios_n / num_tokens_n.clamp(min=1) if options.length_normalised else ratios_n
    margins_p = scores_n[0::2] - scores_n[1::2]
    if options.loss == "ipo":
        losses_p = (margins_p - 1 / (2 * options.beta)) ** 2
    else:
        logits_p = options.beta * margins_p
        flipped = options.label_smoothing
        losses_p = -(1 - flipped) * F.logsigmoid(logits_p) - flipped * F.logsigmoid(-logits_p)
    rewards_n = options.beta * ratios_n.detach()
    chosen_p, rejected_p = rewards_n[0::2], rewards_n[1::2]
    kl_p = -(ratios_n[0::2] + ratios_n[1::2]).detach() / 2
    metrics_mp = torch.stack(
        [chosen_p, rejected_p, chosen_p - rejected_p, (chosen_p > rejected_p).float(), kl_p]
    )
    return PreferenceTerms(losses_p, metrics_mp)
