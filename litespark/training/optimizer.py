"""The optimizer: megatron-core's, around one fused AdamW kernel where there is a GPU.

megatron-core decides which rank owns which part of a weight, sums gradients, gathers weights and
writes checkpoints; all of that stays.  Three passes over memory become one: around the update of
the fp32 masters it multiplies every gradient by the clipping factor, and copies the masters into
the bf16 model.  The kernel (`litespark/ops/adamw.py`) does both on the way, and the factor is
computed on the device, so that the host never waits between the norm and the update.

How it plugs in: megatron-core builds its optimizers as always; before any state exists, the Adam
inside each of them is replaced by `FusedAdamW` over the same groups, and the chain of optimizers
by `FusedOptimizer`, whose `step` differs in the norm and the clipping alone.

Weights that exist in FP8 alone (`litespark/fp8/primary.py`) are written by that kernel too, and by
no other step than the fused one, which on a CPU computes through its reference.

Adams differ in where they count steps: torch's in the state of each parameter, `FusedAdamW` and
Transformer Engine's in the group.  Checkpoints hold one count (`checkpoint/optimizer_state.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MixedPrecisionOptimizer,
)
from torch import Tensor

from litespark.checkpoint.optimizer_state import owned_masters
from litespark.checkpoint.sharded import bare_model
from litespark.config.schema import RunConfig
from litespark.errors import LitesparkError
from litespark.fp8.primary import PrimaryWeights, dequantized, primary_spec
from litespark.ops.adamw import AdamWOptions, adamw_step
from litespark.ops.formats import QuantizeSpec
from litespark.ops.global_norm import sum_of_squares


def build_optimizer(
    config: RunConfig, chunks: list[DistributedDataParallel], *, fused: bool | None = None
) -> TrainingOptimizer:
    """megatron-core's optimizer of all chunks; all ranks call it together.

    `fused` says whether to use the fused step, which elsewhere than on a GPU computes through its
    reference; None is the choice for training: on a GPU and with weights in FP8 yes, else torch's
    or whichever Adam megatron-core finds.

    Raises:
        LitesparkError: `fused` is false, and there are weights in FP8.
    """
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
        bf16=chunks[0].config.bf16,
        params_dtype=chunks[0].config.params_dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    # Without the overrides megatron-core decays the norms as well.
    overrides = get_standard_config_overrides(optimizer_config)
    primary: PrimaryWeights | None = bare_model(chunks[0]).policy.primary
    with _named_half_precision(primary):
        optimizer = get_megatron_optimizer(optimizer_config, chunks, config_overrides=overrides)  # type: ignore[arg-type]
    device = next(chunks[0].parameters()).device
    if fused is None:
        fused = device.type == "cuda" or primary is not None
    assert isinstance(optimizer, ChainedOptimizer), "as all are but that of Megatron-FSDP"
    if fused:
        return FusedOptimizer(optimizer.chained_optimizers, device, adam.clip_grad, primary)
    if primary is not None:
        raise LitesparkError("weights in FP8 are written by the fused optimizer alone")
    return TrainingOptimizer(optimizer.chained_optimizers)


@contextmanager
def _named_half_precision(primary: PrimaryWeights | None) -> Iterator[None]:
    """Within the block weights in FP8 name their type BF16.

    megatron-core makes masters of what has the name of a half-precision type, and refuses others.
    What it puts into them is replaced (`FusedOptimizer.reload_model_params`).
    """
    parameters = [] if primary is None else list(primary.pending)
    for parameter in parameters:
        parameter.type = lambda: "torch.cuda.BFloat16Tensor"  # type: ignore[method-assign]
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter.type


class TrainingOptimizer(ChainedOptimizer):
    """megatron-core's optimizers, whose update can be refused once the gradients' norm is known.

    `accepts` is asked with the norm before anything is changed; None: no one is asked.  A refused
    step leaves weights, masters, moments and the count of steps as they were.
    """

    def __init__(self, optimizers: list[MegatronOptimizer]) -> None:
        super().__init__(optimizers)
        self.accepts: Callable[[float], bool] | None = None
        self._is_refused = False

    def get_grad_norm(self) -> float:
        """The norm of all gradients; the first thing of a step that all ranks know."""
        norm = super().get_grad_norm()
        self._is_refused = self.accepts is not None and not self.accepts(float(norm))
        return norm

    def step_with_ready_grads(self) -> bool:
        """Make the update, or say that it was refused."""
        return False if self._is_refused else super().step_with_ready_grads()

    def write_fp8_weights(self) -> None:
        """Write weights that exist in FP8 alone from masters that were loaded; here are none."""


class FusedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` in one kernel a parameter, which also clips and writes the model's copy.

    Source: Loshchilov and Hutter 2019, algorithm 2.

    Args:
        param_groups: groups as another Adam keeps them, with its options; taken over, not copied.
        weight_of: the model's weight of each master, of the same elements and shape; masters that
            are the model's weights themselves are not in it.
        spec_of: the scale of each master whose weight is in FP8.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        weight_of: dict[Tensor, Tensor],
        spec_of: dict[Tensor, QuantizeSpec] | None = None,
    ) -> None:
        # The base refuses views, which the masters of fp32 models are under the distributed
        # optimizer, so it is given an empty group and the real ones are put in its place.
        super().__init__([{"params": []}], defaults={})
        self.param_groups = param_groups
        self.weight_of = weight_of
        self.spec_of = spec_of or {}
        self.grad_multiplier: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] - takes no closure
        """Update every parameter that has a gradient; gradients count times `grad_multiplier`."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            options = AdamWOptions(
                lr=group["lr"],
                betas=group["betas"],
                epsilon=group["eps"],
                weight_decay=group["weight_decay"],
                step=group["step"],
            )
            for master in group["params"]:
                if master.grad is None:
                    continue
                state = self.state[master]
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in state:
                        state[moment] = torch.zeros_like(master)
                adamw_step(
                    *(master, master.grad, state["exp_avg"], state["exp_avg_sq"], options),
                    weight=self.weight_of.get(master),
                    quantize=self.spec_of.get(master),
                    multiplier=self.grad_multiplier,
                )


class FusedOptimizer(TrainingOptimizer):
    """megatron-core's optimizers with the Adam inside each replaced by `FusedAdamW`.

    Functions in `after_step` are called at the end of each step, when the update and the gathering
    of weights have been launched.  With `overlap_param_gather` the weights of other data-parallel
    ranks arrive later, before the forward pass that needs them.

    `primary` are the weights that exist in FP8 alone, which get their first values here.
    """

    def __init__(
        self,
        optimizers: list[MegatronOptimizer],
        device: torch.device,
        clip_grad: float,
        primary: PrimaryWeights | None = None,
    ) -> None:
        super().__init__(optimizers)
        self.device = device
        self.clip_grad = clip_grad
        self.primary = primary
        self.after_step: list[Callable[[], None]] = []
        self.adams = [_put_in(each) for each in optimizers if each.optimizer is not None]
        if primary is not None:
            self.reload_model_params()

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None] | tuple[Literal[False], None, None]:
        """Update the weights; whether that was done, the gradients' norm, and None.

        The norm is the one before clipping, the same number on all ranks.
        """
        if self.prepare_grads():
            return False, None, None
        norm = self._norm_on_device()
        read_norm = _start_reading(norm)
        # Being asked waits for the norm: some 10 us in which nothing is queued, once a step.
        self._is_refused = self.accepts is not None and not self.accepts(read_norm())
        if self._is_refused:
            return False, read_norm(), None
        for adam in self.adams:
            adam.grad_multiplier = _clipping_factor(norm, self.clip_grad)
        if self.primary is not None:
            self.primary.next_scales(_sharing_group())
        success = self.step_with_ready_grads()
        for function in self.after_step:
            function()
        return success, read_norm(), None

    @torch.no_grad()
    def reload_model_params(self, state_dict: None = None) -> None:
        """Make the masters of the model's weights anew; all ranks call it together.

        Of weights in FP8 they are made of what is `pending`, else of the weights themselves.
        """
        super().reload_model_params(state_dict)
        if self.primary is None:
            return
        pending = self.primary.pending
        for parameter, master, start, stop in owned_masters(self):
            if primary_spec(parameter) is not None:
                value = pending[parameter] if parameter in pending else dequantized(parameter)
                master.copy_(value.view(-1)[start:stop].view(master.shape))
        pending.clear()
        self.write_fp8_weights()

    @torch.no_grad()
    def write_fp8_weights(self) -> None:
        """Write weights that exist in FP8 alone from masters that were loaded, on all ranks."""
        if self.primary is None:
            return
        parts = (
            (master, adam.weight_of[master], spec)
            for adam in self.adams
            for master, spec in adam.spec_of.items()
        )
        self.primary.write(parts, _sharing_group())
        for chunk in self.model_chunks:  # those whose ranks own parts of the weights
            chunk.start_param_sync(force_sync=True)

    def _norm_on_device(self) -> Tensor:
        """Norm of all gradients, each counted once; fp64 [1].

        Which gradients this rank counts, and over which ranks they are summed, is megatron-core's.
        """
        grads: dict[dist.ProcessGroup, list[Tensor]] = {}
        for optimizer in self.chained_optimizers:
            group = optimizer.get_grad_stats_parallel_group()
            grads.setdefault(group, []).extend(optimizer.get_main_grads_for_grad_norm())
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for group, grads_of_group in grads.items():
            squares = sum_of_squares(grads_of_group, self.device)
            dist.all_reduce(squares, group=group)
            total += squares
        return total.sqrt()


def _put_in(optimizer: MegatronOptimizer) -> FusedAdamW:
    """Replace the Adam inside one of megatron-core's optimizers, and the copy into the model."""
    weight_of = dict(_masters_and_weights(optimizer))
    specs = ((master, primary_spec(weight)) for weight, master, *_ in owned_masters(optimizer))
    spec_of = {master: spec for master, spec in specs if spec is not None}
    adam = FusedAdamW(optimizer.optimizer.param_groups, weight_of, spec_of)
    optimizer.optimizer = adam
    if isinstance(optimizer, MixedPrecisionOptimizer):
        # fp32 masters are views of the model; upstream would copy those onto themselves.
        optimizer._copy_main_params_to_model_params = _is_done_by_the_kernel  # type: ignore[method-assign]
    return adam


def _is_done_by_the_kernel() -> None:
    """In place of the copy from the masters into the model."""


def _masters_and_weights(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each fp32 master of this rank with the part of the model's weight that it stands for."""
    if isinstance(optimizer, DistributedOptimizer):
        masters, weights = optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        masters, weights = optimizer.fp32_from_float16_groups, optimizer.float16_groups
    else:
        return
    yield from zip(chain(*masters), chain(*weights), strict=True)


def _sharing_group() -> Any:
    """The ranks that hold parts of the same weights; typed loosely upstream."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def _clipping_factor(norm: Tensor, largest: float) -> Tensor | None:
    """What gradients are multiplied by, fp32 [1]; None where there is no clipping.

    A norm that is not a number clips nothing, as in megatron-core.
    """
    if largest <= 0:
        return None
    factor = largest / (norm + 1e-6)
    return torch.where(factor < 1, factor, 1.0).float()


def _start_reading(value: Tensor) -> Callable[[], float]:
    """Copy a number to the host in the background; what returns it waits for nothing later."""
    if not value.is_cuda:
        return lambda: float(value)
    on_host = torch.empty(1, dtype=value.dtype, pin_memory=True)
    on_host.copy_(value, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> float:
        copied.synchronize()
        return float(on_host)

    return read
