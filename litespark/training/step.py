"""One optimizer step, and one evaluation: forward and backward through megatron-core's schedule."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from litespark.data.loader import Batch, BatchLoader, SampleSource
from litespark.objectives.language_modelling import ForwardStep
from litespark.training.schedule import learning_rate
from litespark.training.state import TrainingRun


@dataclass(frozen=True)
class StepOutcome:
    """What one step left behind.

    `loss_and_tokens` is fp64 [2 + metrics] on the device: sum of the losses, number of tokens (or
    pairs) that this rank saw, and sums of the objective's metrics; zero on ranks that do not hold
    the last pipeline stage.  `refused` is why the update
    was not made, None when it was; `micro_batches` is what this rank was given.
    """

    loss_and_tokens: Tensor
    grad_norm: float
    learning_rate: float
    refused: str | None
    micro_batches: Sequence[Batch | None]


def train_step(run: TrainingRun) -> StepOutcome:
    """Forward and backward of one global batch, gradient clipping, and the optimizer's update."""
    started = time.perf_counter()
    run.progress.enter("waiting for data", step=run.step + 1)
    rate = learning_rate(run.step + 1, run.config)
    set_learning_rate(run, rate)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    micro_batches = _next_micro_batches(run, run.train_batches)
    run.progress.enter("forward and backward")
    loss_and_tokens = run_schedule(run, micro_batches, forward_only=False)
    run.progress.enter("optimizer")
    grad_norm, refused = _update(run, loss_and_tokens, micro_batches)
    run.step += 1
    run.consumed_samples += run.config.batch.global_
    run.timings.steps_seconds += time.perf_counter() - started
    return StepOutcome(loss_and_tokens, grad_norm, rate, refused, micro_batches)


def _update(
    run: TrainingRun, loss_and_tokens: Tensor, micro_batches: Sequence[Batch | None]
) -> tuple[float, str | None]:
    """The optimizer's step unless a judge of the run refuses it; the norm, and why it refused."""
    refused: str | None = None

    def accepts(norm: float) -> bool:
        nonlocal refused
        reasons = (judge(norm, loss_and_tokens, micro_batches) for judge in run.judges)
        refused = next((reason for reason in reasons if reason is not None), None)
        return refused is None

    run.optimizer.accepts = accepts if run.judges else None
    _, grad_norm, _ = run.optimizer.step()
    if refused is None:
        run.policy.weights_changed()
    return float(grad_norm or 0.0), refused


@torch.no_grad()
def evaluate(run: TrainingRun, batches: BatchLoader | None, num_steps: int) -> list[float]:
    """Mean loss and metrics, see `mean_values`, over `num_steps` global batches.

    Training goes on as if it had not been called: FP8 scales learn nothing from these batches.
    """
    total = _no_sums(run)
    with parameters_synchronised(run.chunks), run.policy.unrecorded():
        for chunk in run.chunks:
            chunk.eval()
        for _ in range(num_steps):
            total += run_schedule(run, _next_micro_batches(run, batches), forward_only=True)
        for chunk in run.chunks:
            chunk.train()
    return mean_values(total)


def evaluate_samples(run: TrainingRun, samples: SampleSource | None, num_steps: int) -> float:
    """Mean loss over the first `num_steps` global batches of `samples`, the same every time."""
    return evaluate_means(run, samples, num_steps)[0]


def evaluate_means(run: TrainingRun, samples: SampleSource | None, num_steps: int) -> list[float]:
    """The same with the objective's metrics after the loss."""
    batches = None
    if run.reads_tokens and samples is not None:
        batches = BatchLoader(
            samples,
            micro_batch_size=run.config.batch.micro,
            global_batch_size=run.config.batch.global_,
            data_parallel_rank=run.layout.coordinates(run.process.rank).data,
            data_parallel_size=run.layout.data,
            max_samples=num_steps * run.config.batch.global_,
            document_mask=run.config.data.document_mask,
        )
    timings = replace(run.timings)
    try:
        return evaluate(run, batches, num_steps)
    finally:
        run.timings = timings  # reported for training only
        if batches is not None:
            batches.close()


def mean_loss(loss_and_tokens: Tensor) -> float:
    """Loss per token (or pair) over the whole global batch; see `mean_values`."""
    return mean_values(loss_and_tokens)[0]


def mean_values(loss_and_tokens: Tensor) -> list[float]:
    """Loss and metrics of the whole global batch from each rank's sums; a collective call.

    Divided by the number of tokens, or pairs; 0 where none counts, as the gradient then is.
    """
    total = loss_and_tokens.clone()
    # Typed loosely upstream, as one group or several.
    replicas: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    stages: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.all_reduce(total, group=replicas)
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, src=last_stage, group=stages)
    loss_sum, count, *metric_sums = total.tolist()
    return [value / count if count else 0.0 for value in (loss_sum, *metric_sums)]


def set_learning_rate(run: TrainingRun, rate: float) -> None:
    """Write the rate and each group's weight decay (none on norms) into the optimizer."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = run.config.optimizer.weight_decay * group.get("wd_mult", 1.0)


@contextmanager
def parameters_synchronised(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Within the block every rank's parameters are those of the last step.

    With `overlap_param_gather` a rank's copy of the other ranks' shards is one step old until the
    next forward pass asks for it; evaluating or saving it would be silently wrong.
    """
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


def _next_micro_batches(run: TrainingRun, batches: BatchLoader | None) -> Sequence[Batch | None]:
    if batches is None:
        count = run.config.num_micro_batches(run.process.world_size)
        assert count is not None, "validated before the start"
        return [None] * count
    micro_batches = batches.next_step()
    run.timings.data_wait_seconds += batches.wait_seconds
    run.timings.squared_document_tokens += sum(map(_squared_lengths, micro_batches))
    if run.attach_reference is not None:
        return run.attach_reference(micro_batches)
    return micro_batches


def attended_tokens(run: TrainingRun, squared_document_tokens: float, steps: int) -> float:
    """Mean length of what a token attends within: its document's with document masks, else s.

    `squared_document_tokens` is the sum over all ranks of `steps` steps; the ranks that share a
    data-parallel replica have counted the same documents.
    """
    if not run.config.data.document_mask:
        return float(run.config.data.sequence_length)
    counted_times = run.process.world_size / run.layout.data
    return squared_document_tokens / counted_times / (steps * run.config.tokens_per_step)


def _squared_lengths(batch: Batch) -> float:
    return (
        0.0 if batch.cu_seqlens is None else float(batch.cu_seqlens.diff().double().square().sum())
    )


def run_schedule(
    run: TrainingRun, micro_batches: Sequence[Batch | None], *, forward_only: bool
) -> Tensor:
    """One global batch forward, and backward; fp64 [2 + metrics], see StepOutcome.

    Backward ends with the gradients reduced over the ranks, and FP8's scales for the next step.
    """

    def passes(batches: Sequence[Batch | None]) -> list[dict[str, Any]]:
        return run_reports(run, run.chunks, run.forward_step, batches, forward_only=forward_only)

    total = _no_sums(run)
    if forward_only or run.step_graph is None:
        reports = passes(micro_batches)
    else:
        reports = run.step_graph.run(micro_batches, passes)
    for report in reports:
        total += report["loss_and_tokens"]
    if not forward_only:
        sharing: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        run.policy.end_step(sharing)
    return total


def _no_sums(run: TrainingRun) -> Tensor:
    size = 2 + len(run.metrics)
    return torch.zeros(size, dtype=torch.float64, device=run.process.device.device)


def run_reports(
    run: TrainingRun,
    chunks: Sequence[torch.nn.Module],
    step: ForwardStep,
    micro_batches: Sequence[Batch | None],
    *,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """megatron-core's schedule for these degrees over one global batch, with `step` as forward.

    What the last pipeline stage reports of each micro-batch, in their order; nothing elsewhere.
    Under the interleaved schedule every chunk takes the micro-batches from its own iterator.
    """
    several = len(chunks) > 1
    # A kernel's first use loads it, for which CUDA may wait until the device is idle.  While a
    # receive is in flight that wait has no end: what it waits for can depend, over the other
    # stages, on what this stage would do next.  So sends overlap once a step has used all kernels.
    run.core_config.overlap_p2p_comm = several and run.has_trained and not forward_only
    iterators = [iter(micro_batches) for _ in chunks]
    schedule: Any = get_forward_backward_func()
    length, rows = run.config.data.sequence_length, run.config.batch.micro
    if run.config.data.document_mask:  # the rows are joined (`language_modelling.py`)
        length, rows = length * rows, 1

    is_recorded = run.step_graph is not None and run.step_graph.is_recording

    def forward_step(*args: Any) -> Any:
        run.progress.next_micro_batch()
        if is_recorded:  # an event that is replayed tells no time
            return step(*args)
        with run.forward_clock.measured():
            return step(*args)

    reports: list[dict[str, Any]] = schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        decoder_seq_length=length,
        forward_only=forward_only,
    )
    run.has_trained = run.has_trained or not forward_only
    return reports
