"""Bytes that one micro-batch leaves on a rank until its backward pass, layer by layer.

For backend `triton` this is the list of what the blocks' autograd functions save
(`litespark/modules/fused_attention.py`, `fused_mlp.py`), and of what their backward passes hold
beside it at the most.  For `reference` and `te` it is an estimate from what those modules are known
to keep, and has not been held against a measurement.

Notation: t tokens of a micro-batch on this rank (s b / cp), t' of them outside of the linears
(t / tp under sequence parallelism), h hidden, q and g query and key/value widths, f FFN width and
v vocabulary rows, each of this rank.
Source of the accounting: Korthikanti et al. 2022, arXiv 2205.05198, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from litespark.config.schema import RunConfig

BackendName = Literal["triton", "reference", "te"]

_HALF, _SINGLE, _BYTE = 2, 4, 1  # bytes of bf16, fp32, fp8
_TILE = 128  # elements of one scale of the blockwise recipe
_CHUNK_TOKENS = 4096  # of the LM head's buffer, `ops/linear_cross_entropy.py`
_STATISTICS = 8  # bytes a token of the two norms' rstd


@dataclass(frozen=True)
class LayerBytes:
    """What a layer keeps for backward, its input included, and what its passes hold beside it."""

    kept: int
    input: int
    attention_output: int
    backward_peak: int


@dataclass(frozen=True)
class HeadBytes:
    """The final norm, LM head and loss: at their most in forward, in backward, and kept between."""

    forward_peak: int
    backward_peak: int
    kept: int


@dataclass(frozen=True)
class RankShape:
    """The sizes of one rank's part of a micro-batch; see the module's notation."""

    tokens: int
    split_tokens: int
    sequence: int
    hidden: int
    query: int
    groups: int
    heads: int
    ffn: int
    vocab: int
    batch: int
    context: int
    tensor: int
    splits_tokens: bool

    @classmethod
    def of(cls, config: RunConfig) -> RankShape:
        """The shape under the configuration's degrees."""
        model, parallel = config.model, config.parallel
        tokens = config.batch.micro * config.data.sequence_length // parallel.context
        splits = parallel.sequence and parallel.tensor > 1
        return cls(
            tokens=tokens,
            split_tokens=tokens // parallel.tensor if splits else tokens,
            sequence=config.data.sequence_length // parallel.context,
            hidden=model.hidden_size,
            query=model.num_attention_heads * model.head_dim // parallel.tensor,
            groups=max(1, model.num_query_groups // parallel.tensor) * model.head_dim,
            heads=model.num_attention_heads // parallel.tensor,
            ffn=model.ffn_hidden_size // parallel.tensor,
            vocab=model.padded_vocab_size // parallel.tensor,
            batch=config.batch.micro,
            context=parallel.context,
            tensor=parallel.tensor,
            splits_tokens=splits,
        )


def backend_of(config: RunConfig) -> BackendName:
    """The backend that a GPU run takes: `auto` is `triton` where that can compute the layout."""
    if config.model.backend != "auto":
        return config.model.backend
    model = config.model
    is_plain = not model.qkv_bias and not model.qk_norm
    fits = is_plain and model.num_query_groups >= config.parallel.tensor
    return "triton" if fits or config.precision.mode == "fp8" else "reference"


def layer_bytes(config: RunConfig, *, fp8: bool, recompute: str | None = None) -> LayerBytes:
    """One layer for one micro-batch.

    Args:
        config: the run.
        fp8: whether the layer's linears are in FP8.
        recompute: instead of the configuration's.
    """
    shape = RankShape.of(config)
    mode = recompute or config.training.recompute
    backend = backend_of(config)
    if backend == "triton":
        kept, output = _fused_kept(config, shape, fp8, mode)
        peak = _fused_backward(config, shape, fp8)
    else:
        kept, output = _modules_kept(config, shape, backend, mode)
        peak = _plain_backward(config, shape)
    width = _element_bytes(config)
    return LayerBytes(kept, width * shape.split_tokens * shape.hidden, output, peak)


def uses_fp8(config: RunConfig, layer: int) -> bool:
    """Whether the layer's linears are in FP8; as `litespark.fp8.policy` decides."""
    return fp8_layers(config, range(layer, layer + 1)) == 1


def fp8_layers(config: RunConfig, layers: range) -> int:
    """How many of these layers, numbered from 1, have their linears in FP8."""
    precision = config.precision
    if precision.mode != "fp8":
        return 0
    first = max(layers.start, precision.bf16_first_layers + 1)
    end = min(layers.stop, config.model.num_layers - precision.bf16_last_layers + 1)
    return max(0, end - first)


def fc1_output(config: RunConfig) -> str:
    """How FC1's output waits for backward: bf16, fp8_kept or fp8."""
    if config.precision.recipe == "blockwise" or backend_of(config) == "te":
        return "bf16"
    default = "fp8" if config.precision.recipe == "delayed" else "fp8_kept"
    return config.precision.fc1_output or default


def copies_attention_output(config: RunConfig) -> bool:
    """Whether attention's output is copied to [s, b] order, in BF16.

    FlashAttention writes [b, s]; cuDNN follows its inputs, and so does a single row.
    """
    shape = RankShape.of(config)
    return shape.batch > 1 and attention_library(config) == "flash"


def attention_library(config: RunConfig) -> Literal["flash", "cudnn"]:
    """The library that the choice by measurement takes on Hopper: FlashAttention 4 at size 128."""
    named = config.model.attention
    if named == "auto":
        return "flash" if config.model.head_dim >= 128 else "cudnn"
    return "flash" if named.startswith(("flash", "sdpa-flash")) else "cudnn"


def _element_bytes(config: RunConfig) -> int:
    return _SINGLE if config.precision.mode == "fp32" else _HALF


def _fp8_columns(config: RunConfig) -> float:
    """Bytes of an element in one orientation of an FP8 operand, its scales included."""
    return _BYTE + (_SINGLE / _TILE if config.precision.recipe == "blockwise" else 0)


def _fused_kept(config: RunConfig, shape: RankShape, fp8: bool, mode: str) -> tuple[int, int]:
    """What the two blocks save, and the part of it that is attention's output."""
    width, t, ts = _element_bytes(config), shape.tokens, shape.split_tokens
    column = _fp8_columns(config)
    if mode == "full":
        return width * ts * shape.hidden, 0
    kept = 2 * width * ts * shape.hidden + _STATISTICS * ts  # the blocks' inputs, summed
    if shape.splits_tokens:  # gathered again in backward, from FP8 rows or from the sum
        has_rows = fp8 and config.precision.recipe == "delayed"
        kept += 2 * _BYTE * ts * shape.hidden if has_rows else 0
    else:
        kept += int(2 * (column if fp8 else width) * t * shape.hidden)
    kept += width * t * (shape.query + 2 * shape.groups)
    if shape.context > 1:  # keys and values of the two chunks' pasts, joined for each
        chunks = (2 * shape.context + 1) / (2 * shape.context)
        kept += int(chunks * width * t * shape.context * 2 * shape.groups)
    output = width * t * shape.query + _SINGLE * t * shape.heads
    operand = int(column * t * shape.query) if fp8 else 0
    if not fp8 and (copies_attention_output(config) or shape.context > 1 or mode == "selective"):
        operand = width * t * shape.query
    if mode == "selective":
        output = 0
    kept += output + operand
    kept += int(_fc1_bytes(config, fp8) * t * 2 * shape.ffn)
    if not fp8:
        kept += width * t * shape.ffn
    elif config.precision.recipe == "blockwise":
        kept += int(column * t * shape.ffn)
    return kept, output


def _fc1_bytes(config: RunConfig, fp8: bool) -> int:
    if not fp8:
        return _element_bytes(config)
    return _HALF if fc1_output(config) == "bf16" else _BYTE


def _fused_backward(config: RunConfig, shape: RankShape, fp8: bool) -> int:
    """The most that the MLP's backward holds beside what was saved: SwiGLU's derivative.

    Live are the layer's output gradient, FC2's operand of it, the gradients of the activation and
    of both branches, and in FP8 the activation again.
    """
    width, t, ts = _element_bytes(config), shape.tokens, shape.split_tokens
    column = _fp8_columns(config)
    peak = width * ts * shape.hidden + width * t * shape.ffn
    if not fp8:
        gathered = width * t * shape.hidden if shape.splits_tokens else 0
        return peak + gathered + width * t * 2 * shape.ffn
    peak += int(2 * column * t * shape.hidden)
    if config.precision.recipe == "delayed":
        return peak + t * (2 * 2 * shape.ffn + shape.ffn)
    # Without a scale beforehand the gradient exists in BF16 before it is quantised.
    again = 0 if config.precision.recipe == "blockwise" else t * shape.ffn
    return peak + int(_HALF * t * 2 * shape.ffn + 2 * column * t * 2 * shape.ffn) + again


def _modules_kept(
    config: RunConfig, shape: RankShape, backend: BackendName, mode: str
) -> tuple[int, int]:
    """An estimate for modules that save their inputs one by one, as megatron-core's and TE's do."""
    width, t, ts = _element_bytes(config), shape.tokens, shape.split_tokens
    if mode == "full":
        return width * ts * shape.hidden, 0
    fp8 = backend == "te" and config.precision.mode == "fp8"
    operand = 2 * _BYTE if fp8 else width
    normed = operand * (ts if shape.splits_tokens else t) * shape.hidden
    kept = 2 * (width * ts * shape.hidden + normed) + _STATISTICS * ts
    # Rotated queries and keys beside the projection's own output, which the split views keep.
    rotated = 2 if backend == "reference" else 1
    kept += rotated * width * t * (shape.query + 2 * shape.groups)
    output = width * t * shape.query + _SINGLE * t * shape.heads
    output = 0 if mode == "selective" else output
    kept += output + operand * t * shape.query
    branches = 4 if backend == "reference" else 2  # SiLU's output is kept apart
    kept += width * t * branches * shape.ffn + operand * t * shape.ffn
    return kept, output


def _plain_backward(config: RunConfig, shape: RankShape) -> int:
    width, t = _element_bytes(config), shape.tokens
    return width * (2 * shape.split_tokens * shape.hidden + 5 * t * shape.ffn)


def head_bytes(config: RunConfig) -> HeadBytes:
    """The last stage's end: the fused head goes through chunks of tokens, others hold logits."""
    width, shape = _element_bytes(config), RankShape.of(config)
    t, ts = shape.tokens, shape.split_tokens
    last = width * ts * shape.hidden  # the last layer's output, which the norm keeps
    rows = width * t * shape.hidden
    if backend_of(config) == "reference":
        logits = t * shape.vocab
        kept = last + rows + (width + _SINGLE) * logits
        return HeadBytes(kept + 2 * _SINGLE * logits, kept + (width + _SINGLE) * logits, kept)
    gradient = _SINGLE * shape.vocab * shape.hidden
    buffer = width * min(_CHUNK_TOKENS, t) * shape.vocab
    kept = last + rows + gradient  # the gradient of hidden states in `rows`
    placeholder = width * shape.vocab * shape.hidden
    return HeadBytes(kept + rows + buffer, kept + rows + placeholder, kept)
