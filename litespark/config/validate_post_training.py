"""Checks of `task`, `dpo` and what they ask of other sections."""

from __future__ import annotations

from collections.abc import Iterator

from litespark.config.post_training import DpoConfig
from litespark.config.schema import RunConfig
from litespark.errors import UserError


def check_post_training(config: RunConfig) -> Iterator[UserError]:
    """Yield what is wrong with a run's post-training."""
    if config.task == "pretrain":
        yield from _check_no_options(config)
        return
    if not config.data.document_mask:
        yield UserError(
            f"data.document_mask = false with task = {config.task}",
            "would let the conversations of a sample see each other",
            "Leave it out.",
        )
    if config.task == "sft":
        yield from _check_no_options(config)
    elif config.precision.mode == "fp8" and config.precision.recipe == "delayed":
        yield UserError(
            "precision.recipe = delayed with task = dpo",
            "has no scales yet when the reference is asked",
            "Set precision.recipe=tensorwise, or precision.mode=bf16.",
        )
    elif config.dpo.label_smoothing and config.dpo.loss != "sigmoid":
        yield UserError(
            f"dpo.label_smoothing = {config.dpo.label_smoothing:g}",
            f"has no effect with dpo.loss = {config.dpo.loss}",
            "Leave it out, or set dpo.loss=sigmoid.",
        )


def _check_no_options(config: RunConfig) -> Iterator[UserError]:
    if config.dpo != DpoConfig():
        yield UserError(
            "dpo", f"has no effect with task = {config.task}", "Leave it out, or set task=dpo."
        )
