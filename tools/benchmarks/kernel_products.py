"""Matrix products and attention of a layer: TFLOP/s of ours, and of the library beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litespark.ops.formats import E4M3, E5M2
from tools.benchmarks.kernel_cases import Shapes

Row = dict[str, Any]
Timer = Callable[[Callable[[], object]], float]


class Linear(NamedTuple):
    """A linear layer: input size k, output size n."""

    name: str
    k: int
    n: int


def linears(shapes: Shapes) -> tuple[Linear, ...]:
    """The four of a layer."""
    model = shapes.model
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query = model.num_attention_heads * model.head_dim
    key_value = model.num_query_groups * model.head_dim
    return (
        Linear("qkv", hidden, query + 2 * key_value),
        Linear("proj", query, hidden),
        Linear("fc1", hidden, 2 * ffn),
        Linear("fc2", ffn, hidden),
    )


def product_rows(shapes: Shapes, median_ms: Timer) -> Iterator[Row]:
    """The three products of each linear in FP8, and those of the LM head in BF16."""
    for linear in linears(shapes):
        m, k, n = shapes.m, linear.k, linear.n
        # Both operands with the inner dimension contiguous, as `litespark/ops/products.py` says.
        yield fp8_row(f"{linear.name} forward", (m, n, k), E4M3, shapes, median_ms, fast=True)
        yield fp8_row(f"{linear.name} input gradient", (m, k, n), E5M2, shapes, median_ms)
        yield fp8_row(
            f"{linear.name} weight gradient", (n, k, m), E5M2, shapes, median_ms, added=True
        )
        yield blockwise_row(linear, shapes, median_ms)
    yield from head_rows(shapes, median_ms)


def blockwise_row(linear: Linear, shapes: Shapes, median_ms: Timer) -> Row:
    """The forward product with blockwise scales."""
    from litespark.ops.blockwise import block_scaled_matmul, quantize_blocks, quantize_tiles

    m, k, n = shapes.m, linear.k, linear.n
    row: Row = {
        "op": f"product {linear.name} forward, blockwise",
        "what": f"fp8 [{m}, {k}] x [{n}, {k}]",
    }
    try:
        x = quantize_tiles(shapes.draw(m, k), columns=False).rows()
        weight = quantize_blocks(shapes.draw(n, k)).rows()
        return row | rates(2.0 * m * n * k, lambda: block_scaled_matmul(x, weight), {}, median_ms)
    except Exception as error:
        return failed(row, error)


def fp8_row(
    name: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    shapes: Shapes,
    median_ms: Timer,
    *,
    fast: bool = False,
    added: bool = False,
) -> Row:
    """a b^T of `size` (m, n, k), a in `dtype` and b in E4M3; beside it torch's, which adds nothing.

    With `added` the product is added to fp32, as a weight's gradient is.
    """
    from litespark.ops.products import fp8_product, fp8_product_added

    m, n, k = size
    row: Row = {"op": f"product {name}", "what": f"fp8 [{m}, {k}] x [{n}, {k}]"}
    try:
        a_mk, b_nk = shapes.draw(m, k).to(dtype), shapes.draw(n, k).to(E4M3)
        one = torch.ones(1, device=shapes.device)
        sum_mn = torch.zeros(m, n, device=shapes.device) if added else None

        def ours() -> object:
            if sum_mn is not None:
                return fp8_product_added(a_mk, b_nk, one, one, sum_mn, fast_accumulate=fast)
            return fp8_product(a_mk, b_nk, one, one, fast_accumulate=fast)

        def theirs(fast: bool) -> Tensor:
            return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] - no public one
                a_mk,
                b_nk.t(),
                one.reshape(()),
                one.reshape(()),
                out_dtype=torch.bfloat16,
                use_fast_accum=fast,
            )

        others: dict[str, Callable[[], object]] = {
            "torch": lambda: theirs(False),
            "torch fast": lambda: theirs(True),
        }
        return row | rates(2.0 * m * n * k, ours, others, median_ms)
    except Exception as error:
        return failed(row, error)


def head_rows(shapes: Shapes, median_ms: Timer) -> Iterator[Row]:
    """The LM head's three products over one chunk of tokens, in BF16."""
    from litespark.ops.products import weight_gradient_added

    chunk = min(shapes.m, shapes.head_chunk)
    hidden, vocab = shapes.model.hidden_size, shapes.model.padded_vocab_size
    x_mh, weight_vh = shapes.draw(chunk, hidden), shapes.draw(vocab, hidden)
    gradient_mv = shapes.draw(chunk, vocab)
    sum_vh = torch.zeros(vocab, hidden, device=shapes.device)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: x_mh @ weight_vh.t(),
        "input gradient": lambda: gradient_mv @ weight_vh,
        "weight gradient": lambda: weight_gradient_added(gradient_mv, x_mh, sum_vh),
    }
    for name, call in calls.items():
        row: Row = {"op": f"product head {name}", "what": f"bf16, {chunk} tokens, {vocab} columns"}
        try:
            yield row | rates(2.0 * chunk * hidden * vocab, call, {}, median_ms)
        except Exception as error:
            yield failed(row, error)


def attention_rows(shapes: Shapes, median_ms: Timer) -> Iterator[Row]:
    """Causal attention, forward and backward, of every library that is there.

    FLOPs as in FlashAttention's papers: 2 products forward and 5 backward, half of each masked.
    """
    from litespark.modules.attention_backends import BACKENDS, AttentionCase
    from litespark.modules.attention_choice import measure_on_gpu

    model = shapes.model
    case = AttentionCase(
        batch=shapes.b,
        q_length=shapes.s,
        kv_length=shapes.s,
        heads=model.num_attention_heads,
        groups=model.num_query_groups,
        head_dim=model.head_dim,
        dtype=torch.bfloat16,
        device_type="cuda",
        capability=torch.cuda.get_device_capability(),
    )
    square = float(shapes.s) ** 2 * shapes.b * model.num_attention_heads * model.head_dim
    flops = 7 * 2 * square / 2
    for backend in BACKENDS:
        row: Row = {"op": f"attention {backend.name}", "what": str(case)}
        reason = backend.supports(case) or backend.missing()
        if reason is not None or backend.last_resort:
            yield row | {"error": reason or "holds whole score matrices; not measured"}
            continue
        try:
            milliseconds = measure_on_gpu(backend, case)
            yield row | {"us": milliseconds * 1e3, "tflops": flops / milliseconds / 1e9}
        except Exception as error:
            yield failed(row, error)


def rates(
    flops: float,
    ours: Callable[[], object],
    others: dict[str, Callable[[], object]],
    median_ms: Timer,
) -> Row:
    """Time and TFLOP/s of ours, and TFLOP/s of the others; one that fails is left out."""
    milliseconds = median_ms(ours)
    beside: dict[str, float] = {}
    for name, call in others.items():
        try:
            beside[name] = flops / median_ms(call) / 1e9
        except (RuntimeError, ValueError):  # types or a layout that this torch does not take
            continue
    return {
        "us": milliseconds * 1e3,
        "tflops": flops / milliseconds / 1e9,
        "others": beside,
    }


def failed(row: Row, error: Exception) -> Row:
    """The row of a measurement that failed; raises where the GPU can do no more."""
    torch.cuda.synchronize()
    text = next(iter(str(error).strip().splitlines()), "")
    return row | {"error": f"{type(error).__name__}: {text}"[:160]}
