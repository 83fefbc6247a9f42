"""Puts a run together, always in the same order.

Patches are applied here, and in `single.py` for the commands that need no training.

processes, patches, sameness, user's mistakes, groups, seed, model, optimizer, data, checkpoint
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from litespark.checkpoint.choose import newest_whole
from litespark.checkpoint.folder import find_checkpoint
from litespark.checkpoint.hf.fill import fill_from_hf
from litespark.checkpoint.initial_weights import is_hf_folder
from litespark.checkpoint.load import load_checkpoint, load_random_states, load_weights
from litespark.checkpoint.mirror import fetch_first_whole
from litespark.checkpoint.run_state import RunState, check_same_model
from litespark.checkpoint.save import NO_LIMIT
from litespark.checkpoint.sharded import bare_model, check_readable
from litespark.config.load import dump_config
from litespark.config.schema import RunConfig
from litespark.data.blend import packing_lines
from litespark.data.loader import BatchLoader, SampleSource
from litespark.data.storage import is_remote
from litespark.errors import LitesparkError, UserError
from litespark.metering.meters import RunMeters
from litespark.models.backends import backend_for
from litespark.models.build import build_chunks
from litespark.models.primary_weights import gather_fp8_as_bytes, keep_weights_in_fp8
from litespark.models.transformer_config import transformer_config
from litespark.objectives.objective import objective_for
from litespark.parallel.groups import (
    Process,
    gather_objects,
    start_model_parallel,
    start_process_group,
)
from litespark.parallel.layout import RankLayout
from litespark.parallel.rng import seed_all
from litespark.training.agreement import on_all_ranks
from litespark.training.gradients import finalize_gradients
from litespark.training.lock import lock_run_folder
from litespark.training.optimizer import build_optimizer
from litespark.training.preflight import Preflight, preflight, remote_candidates
from litespark.training.reference import prepare_reference
from litespark.training.same_everywhere import check_same_everywhere, check_same_folder
from litespark.training.state import TrainingRun
from litespark.training.step_graph import StepGraph
from litespark.utils.files import write_text_atomically
from megatron_patches import applied_patches, apply_patches

logger = logging.getLogger("litespark.training")


def set_up(config: RunConfig) -> TrainingRun:
    """Everything from the process group to the loaded checkpoint.

    Raises:
        UserError: on every rank alike, whichever rank found the mistake.
    """
    process = start_processes(config)
    check_same_everywhere(config)
    checked = on_all_ranks(lambda: preflight(config, process.world_size))
    run = build_run(config, process)
    run.validation = checked.validation
    run.folder_lock = on_all_ranks(lambda: _take_folder(run))
    check_same_folder(run.folder, is_first=run.process.is_first)
    checkpoint = newest_whole(_candidates(run, checked), verify=config.checkpoint.verify)
    if checkpoint is None:
        run.record_event("started", f"{run.layout.describe()}, {_start_weights(run)}")
    prepare_reference(
        run,
        checked.train,
        checked.validation,
        initial_weights=None if checkpoint is None else lambda: _start_weights(run),
    )
    if checkpoint is not None:
        _resume(run, checkpoint)
    if run.process.is_first:
        write_text_atomically(run.folder / "config.yaml", dump_config(config))
        for line in packing_lines((checked.train, checked.validation)):
            logger.info("data: %s", line)
    if run.reads_tokens:
        run.train_batches = batch_loader(run, checked.train)
    return run


def start_processes(config: RunConfig) -> Process:
    """Join the process group and apply the patches to megatron-core that this device needs."""
    process = start_process_group(config.resilience.collective_timeout_seconds)
    apply_patches(process.device.type)
    return process


def build_run(config: RunConfig, process: Process) -> TrainingRun:
    """A checked configuration's groups, model and optimizer; no data yet, and initial weights.

    Raises:
        UserError: on every rank alike, if the backend asked for cannot compute this here.
    """
    on_all_ranks(lambda: backend_for(config))
    # First of all: building and loading cost energy too.
    meters = RunMeters(reads_host=process.local_rank == 0)
    logger.info(
        "%d patches to megatron-core, see megatron_patches/README.md", len(applied_patches())
    )
    start_model_parallel(config.parallel, config.resilience.collective_timeout_seconds)
    seed_all(config.seed)
    core_config = transformer_config(config)
    chunks = _build_model(config, core_config)
    optimizer = build_optimizer(config, chunks)
    _connect(config, core_config, chunks, optimizer)
    objective = objective_for(config, process.device.device)
    return TrainingRun(
        config=config,
        process=process,
        layout=RankLayout.of(config.parallel, process.world_size),
        core_config=core_config,
        chunks=chunks,
        optimizer=optimizer,
        forward_step=objective.forward_step,
        metrics=objective.metrics,
        train_batches=None,
        validation=None,
        reads_tokens=_reads_tokens(config),
        meters=meters,
        step_graph=_step_graph(config, core_config, chunks, process.device.device),
    )


def batch_loader(run: TrainingRun, samples: SampleSource) -> BatchLoader:
    """This rank's share of the global batches, from the first sample that is not consumed yet."""
    return BatchLoader(
        samples,
        micro_batch_size=run.config.batch.micro,
        global_batch_size=run.config.batch.global_,
        data_parallel_rank=run.layout.coordinates(run.process.rank).data,
        data_parallel_size=run.layout.data,
        consumed_samples=run.consumed_samples,
        document_mask=run.config.data.document_mask,
    )


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
    modules = [Float16Module(core_config, chunk) if is_half else chunk for chunk in chunks]
    if config.precision.mode == "fp8" and config.precision.primary_weights == "fp8":
        keep_weights_in_fp8(chunks)  # after what makes all parameters BF16
    with _hooks_may_be_recorded(config):
        wrapped = [
            DistributedDataParallel(
                config=core_config,
                ddp_config=ddp_config,
                module=module,
                # Chunks after the first are not on the critical path: buckets only split them.
                disable_bucketing=number > 0,
            )
            for number, module in enumerate(modules)
        ]
    for chunk in wrapped:
        gather_fp8_as_bytes(chunk)
    return wrapped


@contextmanager
def _hooks_may_be_recorded(config: RunConfig) -> Iterator[None]:
    """Within the block DDP registers its hooks, for a step that is to be recorded.

    Autograd takes a weight's gradient over on the stream that was current when the weight was first
    used, which is when DDP registers its hook.  The default stream, which waits for all others and
    they for it, cannot be part of a recording.  Source: megatron-core's `training.py`, get_model.
    """
    if not (config.training.cuda_graph and torch.cuda.is_available()):
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _connect(
    config: RunConfig,
    core_config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> None:
    """The functions that megatron-core's schedules call; without them no gradient is reduced."""

    def one_or_all(functions: list[Callable]) -> Callable | list[Callable]:
        return functions if len(functions) > 1 else functions[0]

    core_config.finalize_model_grads_func = finalize_gradients
    core_config.grad_scale_func = optimizer.scale_loss
    core_config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])  # type: ignore[assignment]
    if config.parallel.overlap_grad_reduce:
        core_config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in chunks])  # type: ignore[assignment]
    if config.parallel.overlap_param_gather:
        core_config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])  # type: ignore[assignment]


def _step_graph(
    config: RunConfig,
    core_config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    device: torch.device,
) -> StepGraph | None:
    """Where the passes of a step are recorded, if that is asked for and there is a GPU."""
    if not config.training.cuda_graph:
        return None
    if device.type != "cuda":
        logger.info("training.cuda_graph has no effect on a CPU")
        return None
    return StepGraph(bare_model(chunks[0]).policy, core_config, device)


def _reads_tokens(config: RunConfig) -> bool:
    """The first stage embeds tokens and the last compares labels; stages between see neither.

    With document masks all of them need to know where documents begin.
    """
    if config.data.document_mask:
        return True
    return parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()


def go_back(run: TrainingRun, checkpoint: Path) -> None:
    """Put a run that is under way into the state of a checkpoint; all ranks call it together.

    It goes on with the samples that it has not seen yet: those between the checkpoint and now are
    what it went astray on.  So do the random generators.
    """
    with run.progress.suspended():
        _load(run, checkpoint)
    if run.step_graph is not None:
        run.step_graph.forget()
    if run.train_batches is not None:
        samples = run.train_batches.samples
        run.train_batches.close()
        run.train_batches = batch_loader(run, samples)


def _load(run: TrainingRun, checkpoint: Path) -> RunState:
    """Model, optimizer, step and FP8 scales of a checkpoint.

    Raises:
        UserError: on every rank alike, if it cannot be read or does not fit.
    """
    on_all_ranks(lambda: _check_fits(run, checkpoint))
    try:
        state = load_checkpoint(checkpoint, run.chunks, run.optimizer)
    except UserError as error:
        error.on_every_rank = True  # torch's checkpoint reader tells all ranks of a fault of one
        raise
    run.step = state.step
    run.policy.load_state(state.fp8_scales)
    run.optimizer.write_fp8_weights()
    run.policy.weights_changed()
    return state


def _candidates(run: TrainingRun, checked: Preflight) -> list[Path]:
    """The checkpoints to resume from; where there are none here, one is fetched from a store.

    Raises:
        LitesparkError: on every rank alike, if the store cannot be read or holds damaged ones only.
    """
    if run.config.checkpoint.mirror is None and not is_remote(run.config.run.resume):
        return checked.candidates
    candidates, error = checked.candidates, None
    if run.process.is_first:
        try:
            remotes = remote_candidates(run.config, candidates)
            if remotes:
                candidates = [fetch_first_whole(remotes, run.folder / "checkpoints")]
        except Exception as found:  # whatever it is, the other ranks must not wait for this one
            error = found if isinstance(found, LitesparkError) else LitesparkError(repr(found))
    # A transfer takes as long as it takes.
    group: Any = dist.new_group(backend="gloo", timeout=NO_LIMIT)
    candidates, error = gather_objects((candidates, error), group)[0]
    if error is not None:
        error.on_every_rank = True
        raise error
    return candidates


def _resume(run: TrainingRun, checkpoint: Path) -> None:
    state = _load(run, checkpoint)
    run.consumed_samples = state.consumed_samples
    run.policy.moved_layers = set(state.bf16_layers)
    seeded_because = on_all_ranks(lambda: load_random_states(checkpoint, state, run.layout))
    detail = f"{run.layout.describe()}, from {checkpoint.name}"
    run.record_event("resumed", detail)
    if run.process.is_first:
        logger.info("resumed at step %d: %s", run.step, detail)
        _tell_differences(run, state, seeded_because)


def _start_weights(run: TrainingRun) -> str:
    """Take over the weights of `run.init_from`, if there are any; which weights the run has."""
    source = run.config.run.init_from
    if source is None:
        return "from initial weights"
    with run.progress.suspended():
        if is_hf_folder(source):
            on_all_ranks(lambda: fill_from_hf(Path(source), run.chunks, run.config.model))
        else:
            checkpoint = on_all_ranks(lambda: find_checkpoint(source))
            newest_whole([checkpoint], verify=run.config.checkpoint.verify)
            load_weights(checkpoint, run.chunks)
    run.optimizer.reload_model_params()
    run.policy.weights_changed()
    if run.process.is_first:
        logger.info("weights of %s; optimizer and schedule start anew", source)
    return f"with the weights of {source}"


def _check_fits(run: TrainingRun, checkpoint: Path) -> None:
    check_same_model(RunState.read(checkpoint), checkpoint, run.config.model)
    check_readable(checkpoint)


def _tell_differences(run: TrainingRun, state: RunState, seeded_because: str | None) -> None:
    """Say what makes the rest of this run differ from what it would have been."""
    if seeded_because is not None:
        logger.info("%s: random generators are seeded anew", seeded_because)
    now = run.config.data.model_dump(mode="json") | {"seed": run.config.seed}
    saved = {"packing": "stream"} | state.data | {"seed": state.seed}
    for key in ("blend", "split", "sequence_length", "packing", "seed"):
        if now[key] != saved[key]:
            logger.warning(
                "%s was %s and is %s: samples from number %d on are not those that an "
                "uninterrupted run would have seen",
                *(key, saved[key], now[key], run.consumed_samples),
            )
