"""What a run is trained for: a forward step, and what it reports beside the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from litespark.config.schema import RunConfig
from litespark.objectives.dpo import dpo_step
from litespark.objectives.language_modelling import ForwardStep, language_modelling_step
from litespark.objectives.preferences import METRICS


@dataclass(frozen=True)
class Objective:
    """One micro-batch's forward, as megatron-core's schedules call it.

    Every report of a micro-batch holds `loss_and_tokens`, fp64 [2 + metrics]: the sum of the
    losses, the number of what they are divided by (tokens, or pairs), and the sums of the named
    metrics.
    """

    forward_step: ForwardStep
    metrics: tuple[str, ...] = ()


def objective_for(config: RunConfig, device: torch.device) -> Objective:
    """The objective of `config.task`.

    Supervised fine-tuning is language modelling whose batches count the answers' tokens alone: the
    sum over all of them in the global batch, divided once.
    """
    if config.task == "dpo":
        return Objective(dpo_step(device, config.dpo), METRICS)
    return Objective(language_modelling_step(device))
