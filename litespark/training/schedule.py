"""The learning rate as a pure function of the step, so that there is no state to save."""

from __future__ import annotations

import math

from litespark.config.schema import RunConfig


def learning_rate(step: int, config: RunConfig) -> float:
    """Learning rate of optimizer step `step`, which counts from 1.

    Warm-up rises linearly and reaches `optimizer.lr` at step `warmup_steps`.  Afterwards `cosine`
    follows half a cosine (Loshchilov and Hutter 2017, eq. 5) and `linear` a line down to `min_lr`;
    `wsd` stays and falls linearly over its last steps (Hu et al. 2024, section 4.1).
    """
    peak, floor = config.optimizer.lr, config.schedule.min_lr
    warmup, total = config.schedule.warmup_steps, config.total_steps
    if step <= warmup:
        return peak * step / warmup
    kind = config.schedule.kind
    if kind == "constant":
        return peak
    if kind == "wsd":
        decay_steps = config.schedule.decay_steps or max(1, total // 10)
        start = total - decay_steps
    else:
        start = warmup
        decay_steps = max(1, (config.schedule.decay_steps or total) - warmup)
    progress = min(max((step - start) / decay_steps, 0.0), 1.0)
    if kind == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak + (floor - peak) * progress
