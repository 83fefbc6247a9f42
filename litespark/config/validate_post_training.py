"""Checks of `task`, `dpo` and what they ask of other sections."""

from __future__ import annotations

from collections.abc import Iterator

from litespark.config.post_training import DpoConfig
from litespark.config.schema import RunConfig
from litespark.errors import UserError


def check_post_training(config: RunConfig) -> Iterator[UserError]:
    """Yield what is wrong with a run's post-training."""
    yield from _check_lora(config)
    yield from _check_adapters_off(config)
    yield from _check_fp8_weights(config)
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


def _check_lora(config: RunConfig) -> Iterator[UserError]:
    if config.lora is None:
        return
    if config.model.backend == "te":
        yield UserError(
            "lora with model.backend = te",
            "is not supported: adapters are computed by the backends triton and reference",
            "Set model.backend=auto, or leave out lora.",
        )
    if config.model.tie_embeddings and config.parallel.pipeline > 1:
        yield UserError(
            "lora with model.tie_embeddings and parallel.pipeline above 1",
            "is not supported: megatron-core sums the tied embedding's gradient, which is frozen",
            "Set parallel.pipeline=1, or leave out lora.",
        )


def _check_adapters_off(config: RunConfig) -> Iterator[UserError]:
    """The frozen reference of adapters is the model that trains, between two of its steps."""
    if config.lora is None or config.dpo.reference != "frozen":
        return
    if config.parallel.overlap_param_gather:
        yield UserError(
            "dpo.reference = frozen with lora and parallel.overlap_param_gather",
            "would gather the weights of the next step for the reference",
            "Set parallel.overlap_param_gather=false, or dpo.reference=precomputed.",
        )


def _check_fp8_weights(config: RunConfig) -> Iterator[UserError]:
    """Weights that exist in FP8 alone can be neither added to nor copied."""
    precision = config.precision
    if precision.mode != "fp8" or precision.primary_weights != "fp8":
        return
    copies = config.task == "dpo" and config.dpo.reference == "frozen"
    for what, asked in (("lora", config.lora is not None), ("dpo.reference = frozen", copies)):
        if asked:
            yield UserError(
                f"precision.primary_weights = fp8 with {what}",
                "is not supported: it takes weights in BF16",
                "Set precision.primary_weights=bf16.",
            )


def _check_no_options(config: RunConfig) -> Iterator[UserError]:
    if config.dpo != DpoConfig():
        yield UserError(
            "dpo", f"has no effect with task = {config.task}", "Leave it out, or set task=dpo."
        )
