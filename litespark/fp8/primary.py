"""Weights that exist in FP8 alone, beside their fp32 masters.

A weight of an FP8 linear need not be kept in BF16: nothing computes with it.  Here the parameter
itself is E4M3 [n, k], a byte an element.  The optimizer's kernel writes the next one from the
master (`litespark/ops/adamw.py`), data-parallel ranks exchange bytes, and the transpose that
Hopper's products want beside it is made once a step, after that.

    stored = saturate(master * scale)       scale = 2^e with   128 <= largest * scale < 256

The scale has to be known before the pass that writes, on all ranks that hold parts of the weight,
so it is of the largest value after the step *before*, which that step's kernel recorded: one
all-reduce of a number a weight.  A step of AdamW changes a weight by about the learning rate; up to
448, where E4M3 ends, the largest may grow 1.75-fold before it saturates, and the next scale knows.
A power of two changes no mantissa: what is stored is the master rounded to E4M3's four bits,
whatever the scale, unless it is below 2^-13 of the largest.  So the tensor-parallel ranks,
which share scales, and other layouts, compute with the same weights.

The scale in use belongs to the stored bytes: it changes with them and stays when an update is
refused, and checkpoints keep it, because that of the masters may be another by now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from litespark.ops.formats import E4M3, QuantizeSpec, saturate

_EXPONENT_OF_LARGEST = 8  # the largest value is stored below 2^8
_LARGEST_EXPONENT = 126  # of a scale: its reciprocal must be a normal number too


def primary_spec(weight: Tensor) -> QuantizeSpec | None:
    """The scale of a weight that exists in FP8 alone; None for any other."""
    return getattr(weight, "fp8_spec", None)


def dequantized(weight: Tensor) -> Tensor:
    """A weight as BF16 if it exists in FP8 alone, with its rounding; any other as it is."""
    spec = primary_spec(weight)
    if spec is None:
        return weight
    return weight.detach().to(torch.bfloat16) * spec.scale_inv.to(torch.bfloat16)  # a power of two


class PrimaryWeights:
    """The weights of one rank that exist in FP8 alone, and their scales.

    Making it turns the parameters into E4M3 and marks them.  They hold zeros until the optimizer
    has masters: `pending` keeps, in the format they had, the values that masters start from.

    Args:
        parameters: by names that are the same at every layout.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.names = list(parameters)
        self.pending: dict[Tensor, Tensor] = {}
        self._loaded: dict[int, float] = {}
        count = len(self.names)
        device = next(iter(parameters.values())).device if count else None
        self.amax_w = torch.zeros(count, device=device)
        # cuBLASLt reads a scale only at a multiple of 16 bytes: four floats apart.
        self.scale_w = torch.ones(count, 4, device=device)[:, 0]
        self.scale_inv_w = torch.ones(count, 4, device=device)[:, 0]
        for index, parameter in enumerate(parameters.values()):
            own = slice(index, index + 1)
            spec = QuantizeSpec(E4M3, self.scale_w[own], self.scale_inv_w[own], self.amax_w[own])
            self.pending[parameter] = parameter.data
            parameter.data = torch.zeros_like(parameter.data, dtype=E4M3)
            parameter.fp8_spec = spec  # type: ignore[attr-defined] - the mark

    @torch.no_grad()
    def next_scales(self, group: ProcessGroup | None) -> None:
        """Before an update: the scales of the weights it writes, from the largest values so far.

        `group` holds the ranks that have parts of the same weights: tensor, context and data
        parallel.  A weight without a finite value but zero keeps its scale.
        """
        if not self.names:
            return
        self.amax_w.nan_to_num_(nan=0.0, posinf=0.0)
        if group is not None and group.size() > 1:
            dist.all_reduce(self.amax_w, op=dist.ReduceOp.MAX, group=group)
        exponent_w = _EXPONENT_OF_LARGEST - torch.frexp(self.amax_w).exponent
        exponent_w = exponent_w.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        is_known_w = self.amax_w > 0
        self.scale_w.copy_(torch.where(is_known_w, _power_of_two(exponent_w), self.scale_w))
        self.scale_inv_w.copy_(1.0 / self.scale_w)
        self.amax_w.zero_()

    @torch.no_grad()
    def write(
        self, parts: Iterable[tuple[Tensor, Tensor, QuantizeSpec]], group: ProcessGroup | None
    ) -> None:
        """Write weights anew from masters that were not updated but set; all of `group` together.

        Args:
            parts: of every weight, this rank's part of the master, of the stored weight, the scale.
            group: as for `next_scales`.
        """
        parts = list(parts)
        self.amax_w.zero_()
        for master, _, spec in parts:
            torch.maximum(spec.amax, master.abs().amax().reshape(1), out=spec.amax)
        self.next_scales(group)
        for index, scale in self._loaded.items():
            self.scale_w[index] = scale
            self.scale_inv_w[index] = 1.0 / scale
        self._loaded = {}
        for master, stored, spec in parts:
            stored.copy_(saturate(master, spec))

    def state(self) -> dict[str, list[float]]:
        """The scale in use of each weight by name, for checkpoints."""
        return {
            name: [scale] for name, scale in zip(self.names, self.scale_w.tolist(), strict=True)
        }

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Give what is written next from masters these scales, where there are any."""
        self._loaded = {}
        for index, name in enumerate(self.names):
            scale = next(iter(state.get(name, ())), 0.0)
            if 2.0**-_LARGEST_EXPONENT <= scale <= 2.0**_LARGEST_EXPONENT:
                self._loaded[index] = 2.0 ** math.floor(math.log2(scale))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exactly; the exponents are int32 from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)
