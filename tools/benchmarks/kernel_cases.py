"""Every kernel of `litespark/ops` at the shapes of a training step, with the bytes it must move.

The bytes are the fewest possible: each input read once from memory, each output written once.  What
a kernel reads a second time from the L2 cache does not count; partial sums, scales and statistics
are too small to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litespark.config.schema import ModelConfig
from litespark.ops.dispatch import LaunchConfig
from litespark.ops.formats import E4M3, E5M2, QuantizeSpec

Candidates = dict[str, tuple[LaunchConfig, ...]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of one micro-batch on one GPU: `s` positions of `b` samples, m = s b tokens."""

    model: ModelConfig
    s: int
    b: int
    device: torch.device
    head_chunk: int = 4096  # tokens whose logits are held at a time

    @property
    def m(self) -> int:
        """Tokens."""
        return self.s * self.b

    def draw(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random values: kernels run faster on zeros."""
        values = torch.randn(size, device=self.device, dtype=torch.float32)
        return values.to(dtype)

    def spec(self, dtype: torch.dtype = E4M3) -> QuantizeSpec:
        """A scale of 1 and a fresh largest value."""
        one = torch.ones(1, device=self.device)
        return QuantizeSpec(dtype, one, one, torch.zeros(1, device=self.device))


@dataclass(frozen=True)
class Case:
    """One launch of one kernel.

    `kernel` is `<file of litespark/ops>.<key of its CANDIDATES>`; `run` takes the launch
    configuration, None for the default.
    """

    kernel: str
    what: str
    bytes_moved: int
    candidates: tuple[LaunchConfig, ...]
    run: Callable[[LaunchConfig | None], Any]


def size_of(*tensors: Tensor) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantize_cases(shapes: Shapes) -> Iterator[Case]:
    """Quantisation apart from the fused kernels: gradients at a block's entry, and weights."""
    from litespark.ops.quantize import CANDIDATES, quantize, raise_amax, transpose

    hidden = shapes.model.hidden_size
    x_mh, spec = shapes.draw(shapes.m, hidden), shapes.spec(E5M2)
    yield Case(
        "quantize.quantize",
        "gradient [m, h], rows and columns",
        2 * size_of(x_mh),
        CANDIDATES["quantize"],
        lambda config: quantize(x_mh, spec, config=config),
    )
    weight, weight_spec = shapes.draw(2 * shapes.model.ffn_hidden_size, hidden), shapes.spec()
    amax = torch.zeros(1, device=shapes.device)
    yield Case(
        "quantize.quantize",
        "FC1's weight, rows and columns",
        2 * size_of(weight),
        CANDIDATES["quantize"],
        lambda config: quantize(weight, weight_spec, config=config),
    )
    yield Case(
        "quantize.amax",
        "FC1's weight",
        size_of(weight),
        CANDIDATES["amax"],
        lambda config: raise_amax(weight, amax, config=config),
    )
    stored_mh = x_mh.to(E4M3)
    yield Case(
        "quantize.transpose",
        "[m, h]",
        2 * size_of(stored_mh),
        CANDIDATES["transpose"],
        lambda config: transpose(stored_mh, config=config),
    )


def blockwise_cases(shapes: Shapes) -> Iterator[Case]:
    """Blockwise quantisation of an activation and of a weight, rows and columns."""
    from litespark.ops.blockwise import CANDIDATES, quantize_blocks, quantize_tiles

    hidden = shapes.model.hidden_size
    x_mh = shapes.draw(shapes.m, hidden)
    weight = shapes.draw(2 * shapes.model.ffn_hidden_size, hidden)
    yield Case(
        "blockwise.tiles",
        "activation [m, h]",
        2 * size_of(x_mh),
        CANDIDATES["tiles"],
        lambda config: quantize_tiles(x_mh, config=config),
    )
    yield Case(
        "blockwise.blocks",
        "FC1's weight",
        2 * size_of(weight),
        CANDIDATES["blocks"],
        lambda config: quantize_blocks(weight, config=config),
    )


def norm_cases(shapes: Shapes) -> Iterator[Case]:
    """Residual sum and norm before a linear, and its backward; with FP8 and without."""
    from litespark.ops.rms_norm import (
        CANDIDATES,
        add_rms_norm,
        recompute_normed,
        rms_norm_backward,
    )

    size = (shapes.m, shapes.model.hidden_size)
    x_mh, residual_mh, gradient_mh = (shapes.draw(*size) for _ in range(3))
    weight_h, spec = shapes.draw(size[1]), shapes.spec()
    norm = add_rms_norm(x_mh, residual_mh, weight_h, 1e-5)
    one = size_of(x_mh)
    yield Case(
        "rms_norm.forward",
        "sum, norm in bf16",
        4 * one,
        CANDIDATES["forward"],
        lambda config: add_rms_norm(x_mh, residual_mh, weight_h, 1e-5, config=config),
    )
    yield Case(
        "rms_norm.forward",
        "sum, norm in fp8 rows",
        3 * one + one // 2,
        CANDIDATES["forward"],
        lambda config: add_rms_norm(
            *(x_mh, residual_mh, weight_h, 1e-5), quantize=spec, columns=False, config=config
        ),
    )
    yield Case(
        "rms_norm.forward_columns",
        "sum, norm in fp8 rows and columns",
        4 * one,
        CANDIDATES["forward_columns"],
        lambda config: add_rms_norm(
            x_mh, residual_mh, weight_h, 1e-5, quantize=spec, config=config
        ),
    )
    saved = (gradient_mh, norm.summed_mh, weight_h, norm.rstd_m)
    yield Case(
        "rms_norm.backward",
        "with the residual's gradient",
        4 * one,
        CANDIDATES["backward"],
        lambda config: rms_norm_backward(*saved, dsummed_mh=x_mh, config=config),
    )
    yield Case(
        "rms_norm.recompute",
        "norm in bf16 from the sum",
        2 * one,
        CANDIDATES["recompute"],
        lambda config: recompute_normed(norm.summed_mh, weight_h, norm.rstd_m, config=config),
    )


def swiglu_cases(shapes: Shapes) -> Iterator[Case]:
    """SwiGLU forward and backward; with FP8 and without."""
    from litespark.ops.swiglu import CANDIDATES, swiglu, swiglu_backward

    ffn = shapes.model.ffn_hidden_size
    elements = shapes.m * ffn
    gate_up = shapes.draw(shapes.m, 2 * ffn)
    spec, store, gradient_spec = shapes.spec(), shapes.spec(), shapes.spec(E5M2)
    yield Case(
        "swiglu.forward",
        "to bf16",
        6 * elements,
        CANDIDATES["forward"],
        lambda config: swiglu(gate_up, config=config),
    )
    yield Case(
        "swiglu.forward",
        "to fp8 rows, its input in fp8",
        7 * elements,
        CANDIDATES["forward"],
        lambda config: swiglu(gate_up, quantize=spec, store=store, config=config),
    )
    yield Case(
        "swiglu.forward_columns",
        "to fp8 rows and columns",
        6 * elements,
        CANDIDATES["forward_columns"],
        lambda config: swiglu(gate_up, quantize=spec, columns=True, config=config),
    )
    dact_mf = shapes.draw(shapes.m, ffn)
    yield Case(
        "swiglu.backward",
        "from bf16 to bf16",
        10 * elements,
        CANDIDATES["backward"],
        lambda config: swiglu_backward(dact_mf, gate_up, config=config),
    )
    stored = swiglu(gate_up, store=store).stored
    assert stored is not None
    yield Case(
        "swiglu.backward_columns",
        "from fp8 to fp8, activation again",
        9 * elements,
        CANDIDATES["backward_columns"],
        lambda config: swiglu_backward(
            dact_mf, stored, quantize=gradient_spec, activation_spec=spec, config=config
        ),
    )


def rope_cases(shapes: Shapes) -> Iterator[Case]:
    """The split of QKV with RoPE, and its backward with and without quantisation."""
    from litespark.ops.rope import CANDIDATES, split_rope, split_rope_backward

    groups, head = shapes.model.num_query_groups, shapes.model.head_dim
    heads = shapes.model.num_attention_heads
    qkv_sbw = shapes.draw(shapes.s, shapes.b, (heads + 2 * groups) * head)
    angles_sr = shapes.draw(shapes.s, head // 2, dtype=torch.float32)
    cos_sr, sin_sr = angles_sr.cos(), angles_sr.sin()
    yield Case(
        "rope.forward",
        "QKV -> q, k, v",
        2 * size_of(qkv_sbw),
        CANDIDATES["forward"],
        lambda config: split_rope(
            qkv_sbw, cos_sr, sin_sr, num_groups=groups, head_dim=head, config=config
        ),
    )
    dq, dk, dv = (shapes.draw(shapes.s, shapes.b, n, head) for n in (heads, groups, groups))
    yield Case(
        "rope.backward",
        "to bf16",
        2 * size_of(dq, dk, dv),
        CANDIDATES["backward"],
        lambda config: split_rope_backward(dq, dk, dv, cos_sr, sin_sr, config=config),
    )
    spec = shapes.spec(E5M2)
    yield Case(
        "rope.backward_fp8",
        "to fp8, rows and columns",
        2 * size_of(dq, dk, dv),
        CANDIDATES["backward_fp8"],
        lambda config: split_rope_backward(
            dq, dk, dv, cos_sr, sin_sr, quantize=spec, config=config
        ),
    )


def cross_entropy_cases(shapes: Shapes) -> Iterator[Case]:
    """What the loss does to one chunk of logits."""
    from litespark.ops.linear_cross_entropy import (
        CANDIDATES,
        VocabularyShard,
        finish_rows_,
        row_statistics,
    )

    vocab = shapes.model.padded_vocab_size
    rows = min(shapes.m, shapes.head_chunk)
    logits_mv = shapes.draw(rows, vocab)
    labels_m = torch.randint(shapes.model.vocab_size, (rows,), device=shapes.device)
    ones_m = torch.ones(rows, device=shapes.device)
    shard = VocabularyShard(0, shapes.model.vocab_size, None)
    statistics_r3m = row_statistics(logits_mv, labels_m, shard)[None]
    # These two overwrite the logits; run again they find gradients there, which cost the same.
    yield Case(
        "linear_cross_entropy.whole",
        f"{rows} rows: loss and gradient",
        2 * size_of(logits_mv),
        CANDIDATES["whole"],
        lambda config: finish_rows_(logits_mv, None, labels_m, ones_m, shard, config=config),
    )
    yield Case(
        "linear_cross_entropy.statistics",
        f"{rows} rows",
        size_of(logits_mv),
        CANDIDATES["statistics"],
        lambda config: row_statistics(logits_mv, labels_m, shard, config),
    )
    yield Case(
        "linear_cross_entropy.gradient",
        f"{rows} rows",
        2 * size_of(logits_mv),
        CANDIDATES["gradient"],
        lambda config: finish_rows_(
            logits_mv, statistics_r3m, labels_m, ones_m, shard, config=config
        ),
    )


def optimizer_cases(shapes: Shapes) -> Iterator[Case]:
    """The update of FC1's weight, and the norm of the gradients of as many values."""
    from litespark.ops import adamw, global_norm

    size = (2 * shapes.model.ffn_hidden_size, shapes.model.hidden_size)
    master, grad, exp_avg = (shapes.draw(*size, dtype=torch.float32) for _ in range(3))
    exp_avg_sq, weight = shapes.draw(*size, dtype=torch.float32).abs_(), shapes.draw(*size)
    options = adamw.AdamWOptions(1e-6, (0.9, 0.95), 1e-8, 0.1, step=10)
    multiplier = torch.ones(1, device=shapes.device)
    for what, stored, quantize in (
        ("FC1's weight", weight, None),
        ("FC1's weight in FP8", weight.to(E4M3), shapes.spec(E4M3)),
    ):
        yield Case(
            "adamw.step",
            what,
            2 * size_of(master, exp_avg, exp_avg_sq) + size_of(grad, stored),
            adamw.CANDIDATES["step"],
            lambda config, stored=stored, quantize=quantize: adamw.adamw_step(
                *(master, grad, exp_avg, exp_avg_sq, options),
                weight=stored,
                quantize=quantize,
                multiplier=multiplier,
                config=config,
            ),
        )
    yield Case(
        "global_norm.sum_of_squares",
        "FC1's gradient",
        size_of(grad),
        global_norm.CANDIDATES["sum_of_squares"],
        lambda config: global_norm.sum_of_squares([grad], shapes.device, config=config),
    )


# By the name that --only takes.
CASES: dict[str, Callable[[Shapes], Iterator[Case]]] = {
    "quantize": quantize_cases,
    "blockwise": blockwise_cases,
    "rms_norm": norm_cases,
    "swiglu": swiglu_cases,
    "rope": rope_cases,
    "cross_entropy": cross_entropy_cases,
    "optimizer": optimizer_cases,
}
