"""Which layer computes in which number format.

A layer is in FP8 unless it is one of the first or last few that the configuration keeps in BF16,
or the guard has moved it back.  The LM head, norms, attention and the embedding are always BF16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from litespark.config.schema import PrecisionConfig
from litespark.fp8.linear import BlockwiseFp8, HighPrecision, LinearFormat, ScaledFp8
from litespark.fp8.primary import PrimaryWeights
from litespark.fp8.scaling import Point, Scaling
from litespark.ops.formats import E4M3


@dataclass(frozen=True)
class LayerFormats:
    """The formats of one layer's linears.

    `fc1_output` is the point in whose FP8 FC1's output is kept for backward, None: as it is;
    `fc1_writes_fp8` says that the product writes it so, and forward reads the same.
    """

    qkv: LinearFormat
    proj: LinearFormat
    fc1: LinearFormat
    fc2: LinearFormat
    fc1_output: Point | None = None
    fc1_writes_fp8: bool = False


class PrecisionPolicy:
    """Formats of all layers of one rank, and the scales behind them.

    Args:
        precision: the configuration's section.
        num_layers: of the whole model.
    """

    def __init__(self, precision: PrecisionConfig, num_layers: int) -> None:
        self.precision = precision
        self.num_layers = num_layers
        self.weights_version = 0  # what is derived from weights is as old as they were
        self.moved_layers: set[int] = set()  # in BF16 by the guard's decision
        self.scaling: Scaling | None = None
        self.primary: PrimaryWeights | None = None  # weights that exist in FP8 alone, if any do
        if precision.mode == "fp8" and precision.recipe != "blockwise":
            self.scaling = Scaling(
                delayed=precision.recipe == "delayed",
                history_steps=precision.amax_history_steps,
                margin=precision.margin,
            )

    def uses_fp8(self, layer_number: int) -> bool:
        """Whether layer `layer_number`, counted from 1 over the whole model, is in FP8."""
        precision = self.precision
        first, last = precision.bf16_first_layers, precision.bf16_last_layers
        return precision.mode == "fp8" and first < layer_number <= self.num_layers - last

    def formats(self, layer_number: int) -> LayerFormats:
        """The formats of layer `layer_number`, counted from 1 over the whole model."""
        if not self.uses_fp8(layer_number):
            return high_precision_formats()
        if self.scaling is None:
            return LayerFormats(BlockwiseFp8(), BlockwiseFp8(), BlockwiseFp8(), BlockwiseFp8())
        scaling, name = self.scaling, f"layers.{layer_number - 1}"
        # Unset: the fastest whose learning was measured (tools/benchmarks/equal_learning.py).
        is_delayed = self.precision.recipe == "delayed"
        fast = (self.precision.fast_accumulation or ("all" if is_delayed else "forward")) == "all"
        kept_as = self.precision.fc1_output or ("fp8" if is_delayed else "fp8_kept")
        qkv, proj, fc1, fc2 = (
            ScaledFp8(scaling, f"{name}.{linear}", fast_gradients=fast)
            for linear in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
        )
        fc1_output = None
        if kept_as != "bf16":
            fc1_output = scaling.point(f"{name}.linear_fc1.output", E4M3)
        return LayerFormats(qkv, proj, fc1, fc2, fc1_output, fc1_writes_fp8=kept_as == "fp8")

    def allocate(self, device: torch.device) -> None:
        """Make the tensors of the scales, once every layer has its formats."""
        if self.scaling is not None:
            self.scaling.allocate(device)

    def end_step(self, group: ProcessGroup | None) -> None:
        """After a step's last backward: compute the next scales.

        `group` holds the ranks that share scales.
        """
        if self.scaling is not None:
            self.scaling.end_step(group)

    def weights_changed(self) -> None:
        """After the weights were updated or loaded: what is derived from them is computed again."""
        self.weights_version += 1

    def unrecorded(self) -> AbstractContextManager[None]:
        """Within the block nothing that is computed influences later scales; see `Scaling`."""
        return nullcontext() if self.scaling is None else self.scaling.unrecorded()

    def state(self) -> dict[str, list[float]]:
        """What checkpoints keep of the scales; see `Scaling.state` and `PrimaryWeights.state`."""
        scales = {} if self.scaling is None else self.scaling.state()
        return scales if self.primary is None else scales | self.primary.state()

    def load_state(self, state: dict[str, list[float]]) -> None:
        """Restore the scales; those of other layers than this rank's are ignored."""
        if self.scaling is not None:
            self.scaling.load_state(state)
        if self.primary is not None:
            self.primary.load_state(state)


def high_precision_formats() -> LayerFormats:
    """Everything in the parameters' own format."""
    plain = HighPrecision()  # it keeps nothing: one serves all
    return LayerFormats(plain, plain, plain, plain)
