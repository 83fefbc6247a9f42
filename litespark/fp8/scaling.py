"""Scales of the tensors that are stored in FP8.

A *point* is one place of the model where a tensor is quantised: the input of a linear layer, or
the gradient of its output.  Two recipes give a point its scale:

- current (`tensorwise`): scale = largest representable / largest value of this very tensor, which
  has to be known before the tensor can be written;
- delayed: the largest value of the steps before predicts this step's, so that the kernel that
  computes the tensor can write it in FP8 at once, and records the largest value on its way.  What
  exceeds the prediction saturates; the next step knows.  A point that has seen no finite value but
  zero has nothing to predict from, and current scales.

The scales of all delayed points stand in one tensor: recording a step, agreeing over the ranks
that share a scale and computing the next scales are a handful of small kernels a step.
Source: Micikevicius et al. 2022, arXiv 2209.05433; the rule is Transformer Engine's
`DelayedScaling` with `amax_compute_algo="max"`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from litespark.ops.formats import FP8_MAX, Fp8Matrix, QuantizeSpec
from litespark.ops.quantize import LARGEST_SCALE, current_scale, quantize, raise_amax


class Scaling:
    """The scales of all points of one rank's model.

    Args:
        delayed: whether scales come from earlier steps; else every tensor gets its own.
        history_steps: optimizer steps whose largest values are remembered.
        margin: scales of points are lowered by 2^margin; weights, which have no point, are not.
    """

    def __init__(self, *, delayed: bool, history_steps: int = 16, margin: int = 0) -> None:
        self.delayed = delayed
        self.history_steps = history_steps
        self.margin = margin
        self.points: list[Point] = []
        self.amax_p = torch.zeros(0)
        self.scale_p = torch.ones(0)
        self.scale_inv_p = torch.ones(0)
        self.history_tp = torch.zeros(0)
        self._limit_p = torch.ones(0)

    def point(self, name: str, dtype: torch.dtype) -> Point:
        """A new point; `name` is the same at every layout of the model."""
        point = Point(self, len(self.points), name, dtype)
        self.points.append(point)
        return point

    def allocate(self, device: torch.device) -> None:
        """Make the tensors, once all points are known."""
        count = len(self.points)
        self.amax_p = torch.zeros(count, device=device)
        # cuBLASLt reads a scale only at a multiple of 16 bytes: four floats apart.
        self.scale_p = torch.ones(count, 4, device=device)[:, 0]
        self.scale_inv_p = torch.ones(count, 4, device=device)[:, 0]
        self.history_tp = torch.zeros(self.history_steps, count, device=device)
        limits = [FP8_MAX[point.dtype] / 2.0**self.margin for point in self.points]
        self._limit_p = torch.tensor(limits, device=device)
        for point in self.points:
            point.delayed_spec = self._delayed_spec(point)

    def _delayed_spec(self, point: Point) -> QuantizeSpec:
        """Views of the point's places, made once: what is in them changes, they do not."""
        own = slice(point.index, point.index + 1)
        return QuantizeSpec(point.dtype, self.scale_p[own], self.scale_inv_p[own], self.amax_p[own])

    @torch.no_grad()
    def end_step(self, group: ProcessGroup | None) -> None:
        """Record this step's largest values and compute the next step's scales.

        What is not finite predicts nothing, and is recorded as 0: one bad step leaves the scale to
        the others.  `group` holds the ranks that share scales: tensor, context and data parallel.
        """
        if not self.delayed or not self.points:
            return
        self.amax_p.nan_to_num_(nan=0.0, posinf=0.0)  # before a rank's infinity hides the others
        if group is not None and group.size() > 1:
            dist.all_reduce(self.amax_p, op=dist.ReduceOp.MAX, group=group)
        self.history_tp.copy_(self.history_tp.roll(1, dims=0))
        self.history_tp[0] = self.amax_p
        self.amax_p.zero_()
        self._compute_scales()
        self._note_new_histories()

    def _note_new_histories(self) -> None:
        """Waits for the device, but only while a point that is used has no history yet."""
        new = [point for point in self.points if point.was_used and not point.has_history]
        if new:
            has_history_p = (self.history_tp.amax(dim=0) > 0).tolist()
            for point in new:
                point.has_history = has_history_p[point.index]
        for point in self.points:
            point.was_used = False

    def _compute_scales(self) -> None:
        largest_p = self.history_tp.amax(dim=0)
        scale_p = torch.where(largest_p > 0, self._limit_p / largest_p, self.scale_p)
        # A tensor of denormal values must end neither in an infinite scale nor in a zero for its
        # reciprocal.
        self.scale_p.copy_(scale_p.clamp(max=LARGEST_SCALE))
        self.scale_inv_p.copy_(1.0 / self.scale_p)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within the block tensors are quantised as ever, and the scales to come do not know."""
        amax_p = self.amax_p.clone()
        used = [point.was_used for point in self.points]
        try:
            yield
        finally:
            self.amax_p.copy_(amax_p)
            for point, was_used in zip(self.points, used, strict=True):
                point.was_used = was_used

    def state(self) -> dict[str, list[float]]:
        """History and running largest value of each point by name, for checkpoints.

        What is not finite is stored as 0, as `end_step` records it.
        """
        largest = torch.cat([self.amax_p[None], self.history_tp])
        columns = largest.nan_to_num(nan=0.0, posinf=0.0).t().tolist()
        return {point.name: columns[point.index] for point in self.points if point.has_history}

    def load_state(self, state: dict[str, list[float]]) -> None:
        """Restore what `state` gave; points that it lacks start with current scales."""
        if not self.delayed:
            return
        for point in self.points:
            values = state.get(point.name)
            if not values:
                continue
            finite = [value if 0.0 < value < math.inf else 0.0 for value in values]
            amax, *history = finite[: self.history_steps + 1]
            self.amax_p[point.index] = amax
            self.history_tp[: len(history), point.index] = torch.tensor(
                history, device=self.history_tp.device
            )
            point.has_history = any(history)
        self._compute_scales()


class Point:
    """One place where a tensor is quantised; made by `Scaling.point`."""

    def __init__(self, scaling: Scaling, index: int, name: str, dtype: torch.dtype) -> None:
        self.scaling = scaling
        self.index = index
        self.name = name
        self.dtype = dtype
        self.has_history = False
        self.was_used = False
        self.delayed_spec: QuantizeSpec | None = None  # from `Scaling.allocate` on

    def spec(self) -> QuantizeSpec | None:
        """The scale a kernel may write FP8 with before the tensor is complete, if there is one."""
        if not (self.scaling.delayed and self.has_history):
            return None
        self.was_used = True
        return self.delayed_spec

    def spec_for(self, values: Tensor, amax: Tensor | None = None) -> QuantizeSpec:
        """The delayed scale, or the current one of `values`, whose largest value may be known."""
        spec = self.spec()
        if spec is not None:
            return spec
        if amax is None:
            amax = torch.zeros(1, device=values.device)
            raise_amax(values, amax)
        if self.scaling.margin:
            amax = amax * 2.0**self.scaling.margin
        scale, scale_inv = current_scale(amax, self.dtype)
        record = self.scaling.amax_p[self.index : self.index + 1]
        self.was_used = True
        return QuantizeSpec(self.dtype, scale, scale_inv, record)

    def new_amax(self, device: torch.device) -> Tensor | None:
        """Where a kernel that computes the tensor should record its largest value; None: nowhere.

        Needed for current scales only: with a delayed one quantising records it.
        """
        if self.scaling.delayed and self.has_history:
            return None
        return torch.zeros(1, device=device)

    def quantize(self, values: Tensor, *, rows: bool = True, columns: bool = True) -> Fp8Matrix:
        """`values` in FP8; see `litespark.ops.quantize.quantize` for the shapes taken."""
        return quantize(values, self.spec_for(values), rows=rows, columns=columns)
