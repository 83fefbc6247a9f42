"""How many kernels the host launches for a step: what small micro-batches are bound by.

A host that launches more slowly than the GPU computes sets the pace.  What one launch costs it is a
calibration's (`host_seconds_per_launch`); how many there are is the code's, by the format of the
linears, and the same for every shape.  Counts are those of profiled steps of the fused blocks in
`tools/benchmarks/results/` (BF16: h100- and h200-paper-3b-bf16; delayed scales: both GPUs'
`-fp8-delayed-fastest`; TP2 with sequence parallelism and two pipeline stages:
h200x2-paper-3b-profiles): the kernels of steps with 4 and with 8 micro-batches, of which follow
those that come once a step.  Those of the other recipes are delayed's and what the code launches
besides: current scales take a zero and a scale at nine places, a search for the largest value at
four of them and a pass that quantises at five; blockwise scales quantise at five places more, add
four weight gradients by themselves and one residual.  What context parallelism launches besides is
not counted.  A step whose passes are replayed as a CUDA graph launches them in one go.
"""

from __future__ import annotations

from litespark.config.schema import RunConfig
from litespark.metering.plan.activations import fp8_layers

# A layer and micro-batch, forward and backward, with its share of embedding, head and loss.
_BF16 = 45
_FP8 = {"delayed": 49, "tensorwise": 76, "blockwise": 59}
_TENSOR_PARALLEL = 16  # collectives, and what their parts are put together with
_MESSAGES = 4  # of a pipeline stage's chunk and micro-batch
_FORWARD_SHARE = 1 / 3  # that full recomputation launches again
# A layer and step: optimizer, gradients set to zero, in FP8 the weights quantised again.
_STEP_BF16, _STEP_FP8 = 11, 32


def launches(config: RunConfig, layers: list[range], micro_batches: int) -> float:
    """Kernels that one rank launches for a step with these layers, numbered from 1."""
    held = sum(map(len, layers))
    in_fp8 = sum(fp8_layers(config, chunk) for chunk in layers)
    each = _BF16 * (held - in_fp8) + _FP8[config.precision.recipe] * in_fp8
    if config.parallel.tensor > 1:
        each += _TENSOR_PARALLEL * held
    if config.parallel.pipeline > 1:
        each += _MESSAGES * len(layers)
    if config.training.cuda_graph:  # one launch for all passes
        each = 0.0
    if config.training.recompute == "full":
        each *= 1 + _FORWARD_SHARE
    return micro_batches * each + _STEP_BF16 * (held - in_fp8) + _STEP_FP8 * in_fp8
