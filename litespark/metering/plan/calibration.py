"""Rates that a GPU reaches in training, and how they follow from measured steps.

A calibration is made from results of `litespark bench --json`, whose breakdown says how long the
products, attention, the kernels between them, the optimizer and the gaps took in a real step: at
the clock that the power cap leaves, which a kernel measured alone does not see.  The calibrations
that come with Litespark are those of the results in `tools/benchmarks/results/`
(`python -m tools.benchmarks.calibrations`); `litespark bench --calibrate FILE` measures another.

Rates are few, so that shapes which were never measured are predicted and not remembered: one rate
of products a number format, one share of the copy bandwidth, attention by head size and length.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from litespark.errors import UserError

BUILT_IN = ("h100-sxm", "h200-sxm")

_FOLDER = "calibrations"


class AttentionRate(BaseModel):
    """Causal TFLOP/s of attention, forward and backward together, at one head size and length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    head_dim: int = Field(ge=1)
    sequence_length: int = Field(ge=1)
    tflops: float = Field(gt=0)


class Calibration(BaseModel):
    """What one GPU of a kind does; seconds and bytes are SI, TFLOP/s as MFU counts work.

    `memory_share` is the share of the copy bandwidth that the kernels between the products reach;
    `gap_seconds_per_layer` is the time without a kernel for a layer and micro-batch, both passes;
    `host_seconds_per_launch` is what the host takes for a kernel (`launches.py`): a step cannot be
    faster than all of its launches.  Without it the host is taken to be fast enough.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str
    device: str
    stack: str = "litespark"
    source: str
    memory_gib: float = Field(gt=0, description="What torch can allocate of the GPU's memory.")
    copy_bytes_per_second: float = Field(gt=0)
    product_tflops: dict[str, float]
    product_overhead_seconds: float = Field(default=2e-6, ge=0)
    memory_share: dict[str, float]
    attention: tuple[AttentionRate, ...]
    attention_forward_share: float = Field(default=0.27, gt=0, lt=1)
    optimizer_bytes_per_second: float = Field(gt=0)
    gap_seconds_per_layer: float = Field(ge=0)
    host_seconds_per_launch: float | None = Field(default=None, gt=0)
    busy_watts: dict[str, float]
    waiting_watts: float = Field(
        gt=0, description="While it waits for others; assumed where the source does not say so."
    )
    idle_watts: float | None = Field(
        default=None, gt=0, description="While it waits for its host; else as for others."
    )

    def attention_seconds(self, flops: float, head_dim: int, sequence_length: int) -> float:
        """Seconds for `flops` (forward and backward, causal) of attention.

        Time a token is linear in the length, with a part that does not depend on it (work on the
        diagonal, rows read and written), so it is interpolated and extrapolated as such.
        """
        sizes = {rate.head_dim for rate in self.attention}
        nearest = min(sizes, key=lambda size: abs(size - head_dim))
        rates = sorted(
            (rate.sequence_length, rate.tflops)
            for rate in self.attention
            if rate.head_dim == nearest
        )
        return flops / (_rate_at(rates, sequence_length) * 1e12)


def _rate_at(rates: list[tuple[int, float]], length: int) -> float:
    """TFLOP/s at a length, where length / rate is a straight line between measured points."""
    if len(rates) == 1:
        known, rate = rates[0]
        fixed = _FIXED_TOKENS  # the shape of the curve at head size 128 on one H100
        return rate * (known + fixed) / known * length / (length + fixed)
    pairs = [(x, x / rate) for x, rate in rates]
    index = next((i for i, (x, _) in enumerate(pairs[1:-1], 1) if x >= length), len(pairs) - 1)
    (x0, y0), (x1, y1) = pairs[index - 1], pairs[index]
    cost = y0 + (y1 - y0) * (length - x0) / (x1 - x0)
    return length / max(cost, 0.5 * y0 * length / x0)


_FIXED_TOKENS = 2200


@lru_cache
def load_calibration(name: str) -> Calibration:
    """A calibration by the name of a GPU that is built in, or of a file.

    Raises:
        UserError: the name is neither, or the file is no calibration.
    """
    if name in BUILT_IN:
        built_in = files("litespark.metering.plan").joinpath(_FOLDER).joinpath(f"{name}.json")
        return Calibration.model_validate_json(built_in.read_text("utf-8"))
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--gpu {name}",
            "is no GPU that is known here and no file",
            f"Give one of {', '.join(BUILT_IN)}, or a file of `litespark bench --calibrate`.",
        )
    try:
        return Calibration.model_validate(json.loads(path.read_text("utf-8")))
    except (ValueError, ValidationError) as error:
        raise UserError(
            name,
            f"is no calibration: {str(error).splitlines()[0]}",
            "Give a file that `litespark bench --calibrate` wrote.",
        ) from error
