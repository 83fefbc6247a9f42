"""Watches that FP8 computes what BF16 would.

Every `precision.guard_every` steps one fixed batch goes forward twice, through the FP8 layers and
through the same layers in BF16, without gradients.  The relative difference of the losses is
logged.  During the BF16 pass every FP8 layer also computes its output from the same input, so that
the layer that drifts is known by itself and not by what the layers before it did to its input:

    error(layer) = |fp8(x) - bf16(x)| / |bf16(x) - x|      x: the layer's input; Frobenius norms

Beyond `precision.guard_max_gap` the guard says so, or moves the layer with the largest error to
BF16 (`precision.guard_action: bf16`), which checkpoints remember.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from litespark.checkpoint.sharded import bare_model
from litespark.fp8.policy import high_precision_formats
from litespark.modules.fused_layer import FusedTransformerLayer
from litespark.parallel.groups import gather_objects
from litespark.training.loop import Hook
from litespark.training.state import TrainingRun
from litespark.training.step import StepOutcome, evaluate_samples

logger = logging.getLogger("litespark.fp8")


class Fp8Guard(Hook):
    """Compares FP8 with BF16 at intervals, and keeps layers in BF16 that it has moved."""

    def on_start(self, run: TrainingRun) -> None:
        """Move the layers again that were moved before the run was resumed."""
        for number in sorted(run.policy.moved_layers):
            _move_to_bf16(run, number)

    def after_step(self, run: TrainingRun, outcome: StepOutcome) -> None:
        """Compare when it is time."""
        every = run.config.precision.guard_every
        if every is not None and run.step % every == 0:
            self.compare(run)

    def compare(self, run: TrainingRun) -> float:
        """The gap, |FP8 loss - BF16 loss| / BF16 loss; acts on it.  All ranks call it together."""
        fp8_loss = _probe(run)
        errors: dict[int, Tensor] = {}
        with _bf16_with_errors(_fp8_layers(run), errors):
            bf16_loss = _probe(run)
        # A batch without labels has a loss of 0 in both.
        gap = abs(fp8_loss - bf16_loss) / (bf16_loss or 1.0)
        everywhere = _largest(
            gather_objects({number: float(error) for number, error in errors.items()})
        )
        # Of equals the lowest: what comes out of one goes into the next.
        worst = max(sorted(everywhere), key=lambda number: everywhere[number], default=None)
        self._act(run, gap, worst, everywhere)
        return gap

    def _act(
        self, run: TrainingRun, gap: float, worst: int | None, errors: dict[int, float]
    ) -> None:
        limit = run.config.precision.guard_max_gap
        detail = f"gap {gap:.2e} (limit {limit:.2e})"
        if worst is not None:
            detail += f", largest error {errors[worst]:.2e} in layer {worst}"
        drifts = not gap <= limit  # a NaN drifts
        moves = drifts and worst is not None and run.config.precision.guard_action == "bf16"
        if moves:
            assert worst is not None
            detail += f"; layer {worst} continues in BF16"
            run.policy.moved_layers.add(worst)
            _move_to_bf16(run, worst)
        run.record_event("fp8_guard", detail)
        if run.process.is_first:
            level = logging.WARNING if drifts else logging.INFO
            logger.log(level, "step %d: FP8 against BF16: %s", run.step, detail)


def _largest(parts: list[dict[int, float]]) -> dict[int, float]:
    """The largest error of each layer; NaN, which compares with nothing, counts as infinite.

    Ranks beside each other see the same errors up to rounding, or those of their own tokens.
    """
    largest: dict[int, float] = {}
    for part in parts:
        for number, error in part.items():
            comparable = math.inf if math.isnan(error) else error
            largest[number] = max(comparable, largest.get(number, 0.0))
    return largest


def _fp8_layers(run: TrainingRun) -> list[FusedTransformerLayer]:
    return [
        layer
        for chunk in run.chunks
        for layer in bare_model(chunk).decoder.layers
        if isinstance(layer, FusedTransformerLayer)
        and run.policy.uses_fp8(layer.layer_number)
        and layer.layer_number not in run.policy.moved_layers
    ]


def _move_to_bf16(run: TrainingRun, number: int) -> None:
    for chunk in run.chunks:
        for layer in bare_model(chunk).decoder.layers:
            if layer.layer_number == number and isinstance(layer, FusedTransformerLayer):
                layer.use_formats(high_precision_formats())


def _probe(run: TrainingRun) -> float:
    """The loss of the first batch of the validation split, or of training where there is none."""
    samples = run.validation
    if samples is None and run.train_batches is not None:
        samples = run.train_batches.samples
    return evaluate_samples(run, samples, 1)


@contextmanager
def _bf16_with_errors(
    layers: list[FusedTransformerLayer], errors: dict[int, Tensor]
) -> Iterator[None]:
    """Within the block the layers compute in BF16, and note how far FP8 would be off."""
    formats = {layer: layer.mlp.formats for layer in layers}
    handles = []
    for layer in layers:
        layer.use_formats(high_precision_formats())
        handles.append(
            layer.register_forward_hook(_noting(formats[layer], errors), with_kwargs=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.use_formats(formats[layer])


def _noting(fp8: Any, errors: dict[int, Tensor]) -> Callable[..., None]:
    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden_sbh = args[0] if args else kwargs["hidden_states"]
        bf16 = layer.mlp.formats
        layer.use_formats(fp8)
        with torch.no_grad():
            approximate_sbh, _ = layer.forward(*args, **kwargs)
            exact_sbh = output[0].float()
            distance = (approximate_sbh.float() - exact_sbh).norm()
            error = distance / (exact_sbh - hidden_sbh.float()).norm()
        layer.use_formats(bf16)
        number = layer.layer_number
        errors[number] = torch.maximum(error, errors.get(number, torch.zeros_like(error)))

    return note
