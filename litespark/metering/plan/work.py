"""What one GPU computes for one micro-batch: products, attention, bytes between them.

Counted for one rank, after tensor and context parallelism have taken their shares.  The bytes are
those that the fused blocks' kernels read and write (`litespark/modules/fused_*.py`); another stack
moves more, which its calibration shows as a smaller share of the copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from litespark.config.schema import RunConfig
from litespark.metering.plan.activations import RankShape, copies_attention_output, fc1_output

OPTIMIZER_BYTES = 34  # a parameter: AdamW reads 16 and writes 14, the norm of gradients reads 4
ZERO_BYTES = 4  # a gradient that is set to zero
WEIGHT_COPY_BYTES = 6  # a matrix element in FP8: largest value 2, read 2, written both ways 2

_CAUSAL_ATTENTION_FLOPS = 6  # a query, key and unit of width: 2 forward, 4 backward


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] x [k, n] and its number format."""

    m: int
    n: int
    k: int
    precision: str

    @property
    def flops(self) -> float:
        """A multiply and an add for each."""
        return 2.0 * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Both operands read and the result written, at least; the result in bf16."""
        operand = 1 if self.precision == "fp8" else 2
        return float(operand * (self.m * self.k + self.k * self.n) + 2 * self.m * self.n)


@dataclass(frozen=True)
class Work:
    """Forward and backward of a part: products of each pass, attention, bytes of each pass."""

    forward: tuple[Product, ...]
    backward: tuple[Product, ...]
    attention_flops: float
    forward_bytes: float
    backward_bytes: float

    @property
    def products(self) -> tuple[Product, ...]:
        """Those of both passes."""
        return (*self.forward, *self.backward)


def layer_work(config: RunConfig, *, fp8: bool) -> Work:
    """One layer and micro-batch; attention is forward and backward, causal."""
    shape = RankShape.of(config)
    t, h, f = shape.tokens, shape.hidden, shape.ffn
    precision = "fp8" if fp8 else "bf16"
    forward = (
        Product(t, shape.query + 2 * shape.groups, h, precision),
        Product(t, h, shape.query, precision),
        Product(t, 2 * f, h, precision),
        Product(t, h, f, precision),
    )
    attended = config.data.sequence_length
    # As MFU counts: backward twice forward; what the library computes again is its own affair.
    causal = _CAUSAL_ATTENTION_FLOPS * t * attended * shape.query
    forward_bytes, backward_bytes = _bytes_between(config, shape, fp8=fp8)
    return Work(forward, tuple(_gradients(forward)), causal, forward_bytes, backward_bytes)


def head_work(config: RunConfig) -> Work:
    """Final norm, LM head and loss of one micro-batch; the head is always in BF16."""
    shape = RankShape.of(config)
    forward = (Product(shape.tokens, shape.vocab, shape.hidden, "bf16"),)
    norm = shape.split_tokens * shape.hidden
    loss = 6.0 * shape.tokens * shape.vocab  # logits read twice and written once
    gradient = 8.0 * shape.vocab * shape.hidden  # the head's gradient, added to its sum
    return Work(forward, tuple(_gradients(forward)), 0.0, 4.0 * norm + loss, 8.0 * norm + gradient)


def _gradients(products: tuple[Product, ...]) -> Iterator[Product]:
    for p in products:
        yield Product(p.m, p.k, p.n, p.precision)
        yield Product(p.n, p.k, p.m, p.precision)


def _bytes_between(config: RunConfig, shape: RankShape, *, fp8: bool) -> tuple[float, float]:
    """Bytes that the kernels between the products read and write, forward and backward.

    Norms, their derivatives, RoPE, SwiGLU, and in FP8 what is quantised in a pass of its own.
    """
    t, h, f, query = shape.tokens, shape.split_tokens * shape.hidden, shape.ffn, shape.query
    rotated = 4.0 * t * (query + 2 * shape.groups)
    forward = 12.0 * h + rotated
    backward = 16.0 * h + rotated
    if not fp8:
        copied = 4.0 * t * query if copies_attention_output(config) else 0.0
        return forward + copied + 6.0 * t * f, backward + 10.0 * t * f
    written = {"fp8": 3.0, "fp8_kept": 7.0, "bf16": 5.0}[fc1_output(config)]
    read = 2.0 if fc1_output(config) == "bf16" else 0.0
    quantised = 4.0 * t * shape.hidden
    forward += 4.0 * t * query + written * t * f
    backward += 2 * quantised + (9.0 + read) * t * f
    ahead, back = _bytes_without_delayed_scales(config, shape)
    return forward + ahead, backward + back


def _bytes_without_delayed_scales(config: RunConfig, shape: RankShape) -> tuple[float, float]:
    """What moves besides, forward and backward, where no scale is known beforehand.

    What a kernel would have written in FP8 it writes in BF16, and a pass quantises it: the linears'
    inputs behind the two norms and SwiGLU, the gradients of QKV's and FC1's outputs.  With current
    scales a pass before it looks for the largest value where no kernel has noted it: in attention's
    output, FC1's output and the gradients of the two blocks.  Blockwise products cannot add to the
    weights' gradients, so that a pass does.
    """
    recipe = config.precision.recipe
    if recipe == "delayed":
        return 0.0, 0.0
    t, f, wide = shape.tokens, shape.ffn, shape.query + 2 * shape.groups
    normed, dqkv = 2 * 4.0 * t * shape.hidden, 4.0 * t * wide
    if recipe == "blockwise":
        weights = shape.hidden * (wide + shape.query + 3 * f)
        return normed + 5.0 * t * f, dqkv + 7.0 * t * f + 12.0 * weights
    largest = 2.0 * t * shape.query + (0.0 if fc1_output(config) == "bf16" else 4.0 * t * f)
    return normed + largest + 4.0 * t * f, dqkv + 8.0 * t * f + 2 * 2.0 * t * shape.hidden
