"""Puts a run together, always in the same order.

Patches are applied here, and in `single.py` for the commands that need no training.

processes, patches, user's mistakes, groups, seed, model, optimizer, data, checkpoint
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TextIO, TypeVar

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from litespark.checkpoint.load import load_checkpoint
from litespark.checkpoint.sharded import check_readable
from litespark.config.load import dump_config
from litespark.config.schema import RunConfig
from litespark.data.loader import BatchLoader
from litespark.errors import ExitCode, LitesparkError, UserError
from litespark.models.build import build_chunks
from litespark.models.transformer_config import transformer_config
from litespark.objectives.language_modelling import language_modelling_step
from litespark.parallel.groups import (
    gather_objects,
    start_model_parallel,
    start_process_group,
)
from litespark.parallel.layout import RankLayout
from litespark.parallel.rng import seed_all
from litespark.training.lock import lock_run_folder
from litespark.training.preflight import Preflight, preflight
from litespark.training.state import TrainingRun
from litespark.utils.files import write_text_atomically
from megatron_patches import apply_patches

logger = logging.getLogger("litespark.training")
T = TypeVar("T")


def set_up(config: RunConfig) -> TrainingRun:
    """Everything from the process group to the loaded checkpoint.

    Raises:
        UserError: on every rank alike, whichever rank found the mistake.
    """
    timeout_seconds = config.resilience.collective_timeout_seconds
    # One hardware queue keeps the order in which kernels and collectives were launched, which is
    # how megatron-core overlaps them; it is read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    process = start_process_group(timeout_seconds)
    patches = apply_patches(process.device.type)
    checked = on_all_ranks(lambda: preflight(config, process.world_size))
    logger.info("%d patches to megatron-core, see megatron_patches/README.md", len(patches))
    start_model_parallel(config.parallel, timeout_seconds)
    seed_all(config.seed)
    core_config = transformer_config(config)
    chunks = _build_model(config, core_config)
    optimizer = _build_optimizer(config, chunks)
    _connect(config, core_config, chunks, optimizer)
    layout = RankLayout.of(config.parallel, process.world_size)
    run = TrainingRun(
        config=config,
        process=process,
        layout=layout,
        core_config=core_config,
        chunks=chunks,
        optimizer=optimizer,
        forward_step=language_modelling_step(process.device.device),
        train_batches=None,
        validation=checked.validation,
        reads_tokens=_reads_tokens(),
    )
    run.folder_lock = on_all_ranks(lambda: _take_folder(run))
    _resume(run, checked)
    if run.process.is_first:
        write_text_atomically(run.folder / "config.yaml", dump_config(config))
    if run.reads_tokens:
        run.train_batches = BatchLoader(
            checked.train,
            micro_batch_size=config.batch.micro,
            global_batch_size=config.batch.global_,
            data_parallel_rank=layout.coordinates(process.rank).data,
            data_parallel_size=layout.data,
            consumed_samples=run.consumed_samples,
        )
    return run


def on_all_ranks(check: Callable[[], T]) -> T:
    """Run a check on every rank; a mistake found by any is raised by all, so that none waits.

    Raises:
        LitesparkError: the mistake or fault of the lowest rank that found one.
    """
    result, error = None, None
    try:
        result = check()
    except Exception as found:  # whatever it is, the other ranks must not wait for this one
        error = found
    is_mistake = isinstance(error, UserError)
    outcomes = gather_objects(None if error is None else (is_mistake, str(error)))
    if error is not None and not is_mistake:
        raise error
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            is_mistake, message = outcome
            raise _Agreed(message) if is_mistake else LitesparkError(f"rank {rank}: {message}")
    return result  # type: ignore[return-value]


class _Agreed(LitesparkError):
    """A user's mistake whose message was made on some rank."""

    exit_code = ExitCode.USER_ERROR
    on_every_rank = True


def _take_folder(run: TrainingRun) -> TextIO | None:
    if not run.process.is_first:
        return None
    run.folder.mkdir(parents=True, exist_ok=True)
    return lock_run_folder(run.folder)


def _build_model(
    config: RunConfig, core_config: TransformerConfig
) -> list[DistributedDataParallel]:
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    chunks = build_chunks(config, core_config)
    is_half = core_config.bf16
    return [
        DistributedDataParallel(
            config=core_config,
            ddp_config=ddp_config,
            module=Float16Module(core_config, chunk) if is_half else chunk,
            # Chunks after the first are not on the critical path: buckets would only split them.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]


def _build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    adam = config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        decoupled_weight_decay=True,
        lr=adam.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.beta1,
        adam_beta2=adam.beta2,
        adam_eps=adam.epsilon,
        clip_grad=adam.clip_grad,
        bf16=config.precision.mode == "bf16",
        params_dtype=chunks[0].config.params_dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    # Without the overrides megatron-core decays the norms as well.
    overrides = get_standard_config_overrides(optimizer_config)
    return get_megatron_optimizer(optimizer_config, chunks, config_overrides=overrides)  # type: ignore[arg-type]


def _connect(
    config: RunConfig,
    core_config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> None:
    """The functions that megatron-core's schedules call; without them no gradient is reduced."""

    def one_or_all(functions: list[Callable]) -> Callable | list[Callable]:
        return functions if len(functions) > 1 else functions[0]

    core_config.finalize_model_grads_func = finalize_model_grads
    core_config.grad_scale_func = optimizer.scale_loss
    core_config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])  # type: ignore[assignment]
    if config.parallel.overlap_grad_reduce:
        core_config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in chunks])  # type: ignore[assignment]
    if config.parallel.overlap_param_gather:
        core_config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])  # type: ignore[assignment]


def _reads_tokens() -> bool:
    """The first stage embeds tokens and the last compares labels; stages between see neither."""
    return parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()


def _resume(run: TrainingRun, checked: Preflight) -> None:
    if checked.checkpoint is None:
        run.record_event("started", f"{run.layout.describe()}, from initial weights")
        return
    checkpoint = checked.checkpoint
    on_all_ranks(lambda: check_readable(checkpoint))
    try:
        state = load_checkpoint(checkpoint, run.chunks, run.optimizer)
    except UserError as error:
        error.on_every_rank = True  # torch's checkpoint reader tells all ranks of a fault of one
        raise
    run.step, run.consumed_samples = state.step, state.consumed_samples
    detail = f"{run.layout.describe()}, from {checked.checkpoint.name}"
    run.record_event("resumed", detail)
    if run.process.is_first:
        logger.info("resumed at step %d: %s", run.step, detail)
        now = run.config.data.model_dump(mode="json") | {"seed": run.config.seed}
        saved = state.data | {"seed": state.seed}
        for key in ("blend", "split", "sequence_length", "seed"):
            if now[key] != saved[key]:
                logger.warning(
                    "%s was %s and is %s: samples from number %d on are not those that an "
                    "uninterrupted run would have seen",
                    *(key, saved[key], now[key], run.consumed_samples),
                )
