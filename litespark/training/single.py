"""One process alone: what exporting and generating need of the machinery of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litespark.checkpoint.folder import CONFIG
from litespark.checkpoint.load import load_weights
from litespark.config.load import load_config
from litespark.config.schema import ParallelConfig, RunConfig
from litespark.errors import UserError
from litespark.models.build import build_chunks
from litespark.models.gpt import GPT
from litespark.models.transformer_config import transformer_config
from litespark.parallel.environment import world_size_from_environment
from litespark.parallel.groups import (
    Process,
    start_model_parallel,
    start_process_group,
    stop_process_group,
)
from litespark.parallel.rng import seed_all
from megatron_patches import apply_patches

TIMEOUT_SECONDS = 600.0


@contextmanager
def single_process() -> Iterator[Process]:
    """Process groups of size 1 with the patches this machine needs; taken down at the end.

    Raises:
        UserError: a launcher has started several processes.
    """
    world_size = world_size_from_environment()
    if world_size not in (None, 1):
        raise UserError(
            f"WORLD_SIZE = {world_size}",
            "this command runs in one process",
            "Start it without torchrun, or unset WORLD_SIZE.",
        )
    try:
        process = start_process_group(TIMEOUT_SECONDS)
        apply_patches(process.device.type)
        start_model_parallel(ParallelConfig(), TIMEOUT_SECONDS)
        seed_all(0)
        yield process
    finally:
        stop_process_group()


def load_model(checkpoint: Path) -> tuple[GPT, RunConfig]:
    """The whole model of a checkpoint in this process, ready to infer, and its configuration.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    config = _for_this_machine(load_config(checkpoint / CONFIG))
    chunks = build_chunks(config, transformer_config(config))
    load_weights(checkpoint, chunks)
    return chunks[0].eval(), config


def _for_this_machine(config: RunConfig) -> RunConfig:
    """One process, the backend that it can compute with, and no FP8, which is for training."""
    mode = "bf16" if config.precision.mode == "fp8" else config.precision.mode
    return config.model_copy(
        update={
            "parallel": ParallelConfig(),
            "model": config.model.model_copy(update={"backend": "auto"}),
            "precision": config.precision.model_copy(update={"mode": mode}),
        }
    )
