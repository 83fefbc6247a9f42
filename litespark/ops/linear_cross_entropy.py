"""The LM head and its cross-entropy in one: the logits of all tokens never exist.

With hidden states x [m, h], weight w [v, h] and labels t:

    z = x w^T,   loss = log sum_j exp(z_j) - z_t,   dz = loss_weight (softmax(z) - onehot(t))

At m = 16384 and v = 32000 the logits are 1 GB in bf16, and a loss written in torch holds several
fp32 copies.  Here the tokens go through one buffer of `chunk_tokens` rows.  Because what leaves is
one number, the weighted sum of the losses, its gradient is known up to one factor before backward
begins: forward overwrites each chunk of z by dz and takes both products at once, dx = dz w and
dw += dz^T x (fp32), and backward only multiplies by the factor.

Bytes: with the whole vocabulary on one rank a single kernel does the row, online maximum and sum
(Milakov and Gimelshein 2018, arXiv 1805.02867), then the gradient in place: z is read once from
DRAM, once from the caches (a row of 32000 is 64 KB) and written once.  Under tensor parallelism a
rank has a shard of each row: a first kernel takes the shard's statistics [3, m] (maximum, sum of
exponentials, the label's logit), the ranks gather them, and a second kernel combines them, as
megatron-core's `vocab_parallel_cross_entropy` does in three reductions, and writes the gradient.

A row with an infinite or NaN logit has loss NaN, -inf included: the sum of exponentials takes up
0 * z.  Gradients in forward, chunk by chunk: Hsu et al. 2024 (Liger Kernel), arXiv 2410.10989.

Shapes: m tokens, h hidden size, v rows of this rank's weight, r ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor

from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig, runs_kernel, tl, triton
from litespark.ops.products import weight_gradient_added
from litespark.ops.weight_gradient import added_to_main_grad, main_grad_of

# A tile is `block_m` strips of `block_n` columns of one row.  With block_n at least 16 bytes for
# each thread, what is reduced over the strips stays within a thread, without a barrier.
CANDIDATES: dict[str, tuple[LaunchConfig, ...]] = {
    "statistics": (
        LaunchConfig(4, 1024, num_warps=4),
        LaunchConfig(2, 1024, num_warps=4),
        LaunchConfig(8, 1024, num_warps=4),
        LaunchConfig(4, 2048, num_warps=8),
        LaunchConfig(2, 4096, num_warps=16),
    ),
    "gradient": (
        LaunchConfig(2, 1024, num_warps=4),
        LaunchConfig(1, 1024, num_warps=4),
        LaunchConfig(4, 1024, num_warps=4),
        LaunchConfig(2, 2048, num_warps=8),
        LaunchConfig(1, 4096, num_warps=16),
    ),
    # Few programs and wide ones first: the rows in flight must fit the caches.
    "whole": (
        LaunchConfig(2, 4096, num_warps=16),
        LaunchConfig(1, 4096, num_warps=16),
        LaunchConfig(4, 4096, num_warps=16),
        LaunchConfig(2, 2048, num_warps=8),
        LaunchConfig(4, 2048, num_warps=8),
        LaunchConfig(1, 8192, num_warps=32),
        LaunchConfig(4, 1024, num_warps=4),
    ),
}

# The maximum of no columns: finite, so that exp(it - maximum) is 0 or 1 and never NaN.
_LOWEST = torch.finfo(torch.float32).min
_LOWEST_CONSTANT = tl.constexpr(_LOWEST)
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class VocabularyShard:
    """Which tokens the rows of this rank's weight are.

    Row i is token `first_token + i`.  Only the first `num_real` rows are tokens (0 to v of them);
    the rest pad the vocabulary and get neither probability nor gradient.  `group` holds the ranks
    that share the vocabulary; None or a group of one: all of it is here.
    """

    first_token: int
    num_real: int
    group: ProcessGroup | None


# --------------------------------------------------------------------------------------- references


def _reference_statistics(logits_mv: Tensor, labels_m: Tensor, shard: VocabularyShard) -> Tensor:
    logits_mv = logits_mv.float()
    real_mv = logits_mv[:, : shard.num_real]
    maximum_m = F.pad(real_mv, (0, 1), value=_LOWEST).amax(dim=1)
    exponentials_mv = (real_mv - maximum_m[:, None]).exp() + real_mv * 0.0
    local_m = labels_m - shard.first_token
    here_m = (local_m >= 0) & (local_m < shard.num_real)
    label_logit_m = logits_mv.gather(1, local_m.where(here_m, 0)[:, None]).squeeze(1)
    label_logit_m = label_logit_m.where(here_m, float("-inf"))
    return torch.stack([maximum_m, exponentials_mv.sum(dim=1), label_logit_m])


def _reference_finish_(
    logits_mv: Tensor,
    statistics_r3m: Tensor,
    labels_m: Tensor,
    loss_weights_m: Tensor,
    shard: VocabularyShard,
    with_gradient: bool,
) -> Tensor:
    maximum_rm, sum_rm, label_logit_rm = statistics_r3m.unbind(dim=1)
    maximum_m = maximum_rm.amax(dim=0)
    exp_sum_m = (sum_rm * (maximum_rm - maximum_m).exp()).sum(dim=0)
    log_sum_m = exp_sum_m.log()
    label_logit_m = label_logit_rm.amax(dim=0)
    known_m = label_logit_m > float("-inf")
    # The zero of an unknown label keeps a NaN.
    losses_m = ((maximum_m - label_logit_m) + log_sum_m).where(known_m, log_sum_m * 0.0)
    if with_gradient:
        gradient_mv = (logits_mv.float() - maximum_m[:, None]).exp() / exp_sum_m[:, None]
        columns_v = torch.arange(logits_mv.size(1), device=logits_mv.device)
        gradient_mv -= (columns_v == (labels_m - shard.first_token)[:, None]).float()
        gradient_mv *= loss_weights_m.where(known_m, 0.0)[:, None]
        logits_mv.copy_(gradient_mv.where(columns_v < shard.num_real, 0.0))
    return losses_m


# ------------------------------------------------------------------------------------------ kernels


@triton.jit
def _exp(x) -> Any:
    """One multiplication and one instruction, where `tl.exp` spends three more on denormals."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _folded(maximum_n, sum_n, logits_mn, zeros_mn) -> Any:
    """Each column's running maximum and sum, one tile on; `zeros` are NaN where the sum must be."""
    new_n = tl.maximum(maximum_n, tl.max(logits_mn, axis=0))
    tile_n = tl.sum(_exp(logits_mn - new_n[None, :]) + zeros_mn, axis=0)
    return new_n, sum_n * _exp(maximum_n - new_n) + tile_n


@triton.jit
def _row_statistics(
    row_ptr, num_real, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> Any:
    """Maximum and sum of exponentials of a row's real columns; fp32 scalars."""
    TILE: tl.constexpr = BLOCK_M * BLOCK_N
    offsets_mn = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    maximum_n = tl.full([BLOCK_N], _LOWEST_CONSTANT, tl.float32)
    sum_n = tl.zeros([BLOCK_N], tl.float32)
    num_full = (num_real // TILE) * TILE
    for start in range(0, num_full, TILE):
        logits_mn = tl.load(row_ptr + (start + offsets_mn)).to(tl.float32)
        maximum_n, sum_n = _folded(maximum_n, sum_n, logits_mn, logits_mn * 0.0)
    # The rest, at most one tile.  Loads are masked by the row's width, which is aligned.
    for start in range(num_full, num_real, TILE):
        columns_mn = start + offsets_mn
        loaded_mn = tl.load(row_ptr + columns_mn, mask=columns_mn < num_columns, other=0.0)
        rest_mn = loaded_mn.to(tl.float32)
        real_mn = columns_mn < num_real
        zeros_mn = tl.where(real_mn, rest_mn * 0.0, 0.0)
        rest_mn = tl.where(real_mn, rest_mn, float("-inf"))
        maximum_n, sum_n = _folded(maximum_n, sum_n, rest_mn, zeros_mn)
    maximum = tl.max(maximum_n, axis=0)
    return maximum, tl.sum(sum_n * _exp(maximum_n - maximum), axis=0)


@triton.jit
def _local_label(label_ptr, first_token, num_real) -> Any:
    """The column of the label, int32, or -1 where it is not among this rank's tokens."""
    column = tl.load(label_ptr) - first_token
    here = (column >= 0) & (column < num_real)
    return tl.where(here, column, -1).to(tl.int32)


@triton.jit
def _label_logit(row_ptr, label_column) -> Any:
    """The label's logit, fp32, or -inf where the label is not here."""
    here = label_column >= 0
    logit = tl.load(row_ptr + tl.where(here, label_column, 0), mask=here, other=0.0)
    return tl.where(here, logit.to(tl.float32), float("-inf"))


@triton.jit
def _overwrite_row(
    row_ptr,
    maximum,
    exp_sum,
    loss_weight,
    label_column,
    label_logit,
    num_real,
    num_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """logits -> loss_weight * (softmax - onehot), 0 in padding columns."""
    TILE: tl.constexpr = BLOCK_M * BLOCK_N
    offsets_mn = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    num_full = (num_real // TILE) * TILE
    # Not exp(logit - log(sum)): of a large logarithm fp32 keeps too few digits.
    factor = loss_weight / exp_sum
    for start in range(0, num_full, TILE):
        at_mn = row_ptr + (start + offsets_mn)
        gradient_mn = _exp(tl.load(at_mn).to(tl.float32) - maximum) * factor
        tl.store(at_mn, gradient_mn.to(row_ptr.dtype.element_ty))
    for start in range(num_full, num_columns, TILE):
        columns_mn = start + offsets_mn
        inside_mn = columns_mn < num_columns
        loaded_mn = tl.load(row_ptr + columns_mn, mask=inside_mn, other=0.0)
        rest_mn = _exp(loaded_mn.to(tl.float32) - maximum) * factor
        rest_mn = tl.where(columns_mn < num_real, rest_mn, 0.0).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + columns_mn, rest_mn, mask=inside_mn)
    # The label's column once more, after every warp: cheaper than a comparison in each column.
    tl.debug_barrier()
    gradient = _exp(label_logit - maximum) * factor - loss_weight
    label_ptr = row_ptr + tl.where(label_column >= 0, label_column, 0)
    tl.store(label_ptr, gradient.to(row_ptr.dtype.element_ty), mask=label_column >= 0)


@triton.jit
def _statistics_kernel(
    logits_ptr,
    labels_ptr,
    statistics_ptr,
    first_token,
    num_real,
    num_columns,
    num_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * num_columns
    label_logit = _label_logit(row_ptr, _local_label(labels_ptr + row, first_token, num_real))
    maximum, exp_sum = _row_statistics(row_ptr, num_real, num_columns, BLOCK_M, BLOCK_N)
    tl.store(statistics_ptr + row, maximum)
    tl.store(statistics_ptr + num_rows + row, exp_sum)
    tl.store(statistics_ptr + 2 * num_rows + row, label_logit)


@triton.jit
def _combined(statistics_ptr, num_rows, num_ranks, BLOCK_R: tl.constexpr) -> Any:
    """The statistics of a row over all ranks."""
    rank_r = tl.arange(0, BLOCK_R)
    here_r = rank_r < num_ranks
    at_r = statistics_ptr + rank_r.to(tl.int64) * (3 * num_rows)
    maximum_r = tl.load(at_r, mask=here_r, other=_LOWEST_CONSTANT)
    sum_r = tl.load(at_r + num_rows, mask=here_r, other=0.0)
    label_logit_r = tl.load(at_r + 2 * num_rows, mask=here_r, other=float("-inf"))
    maximum = tl.max(maximum_r, axis=0)
    exp_sum = tl.sum(sum_r * _exp(maximum_r - maximum), axis=0)
    return maximum, exp_sum, tl.max(label_logit_r, axis=0)


@triton.jit
def _finish_kernel(
    logits_ptr,
    statistics_ptr,
    labels_ptr,
    loss_weights_ptr,
    losses_ptr,
    first_token,
    num_real,
    num_columns,
    num_rows,
    num_ranks,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One row a program: statistics taken (whole rows) or combined, the loss, the gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * num_columns
    label_column = _local_label(labels_ptr + row, first_token, num_real)
    if WHOLE:
        label_logit = _label_logit(row_ptr, label_column)
        maximum, exp_sum = _row_statistics(row_ptr, num_real, num_columns, BLOCK_M, BLOCK_N)
        # Every warp has read the label's logit before one of them overwrites it.
        tl.debug_barrier()
    else:
        maximum, exp_sum, label_logit = _combined(
            statistics_ptr + row, num_rows, num_ranks, BLOCK_R
        )
    log_sum = tl.log(exp_sum)
    known = label_logit > float("-inf")
    # The loss of a label that no rank has is 0, and this zero keeps a NaN.
    loss = tl.where(known, (maximum - label_logit) + log_sum, log_sum * 0.0)
    tl.store(losses_ptr + row, loss)
    if WITH_GRADIENT:
        _overwrite_row(
            row_ptr,
            maximum,
            exp_sum,
            tl.where(known, tl.load(loss_weights_ptr + row), 0.0),
            label_column,
            label_logit,
            num_real,
            num_columns,
            BLOCK_M,
            BLOCK_N,
        )


# ---------------------------------------------------------------------------------------- launchers


def _tile_options(config: LaunchConfig, **constants: Any) -> dict[str, Any]:
    return {
        **constants,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


# ------------------------------------------------------------------------------------------- public


def row_statistics(
    logits_mv: Tensor, labels_m: Tensor, shard: VocabularyShard, config: LaunchConfig | None = None
) -> Tensor:
    """Maximum, sum of exponentials (relative to it) and label's logit of each row, fp32 [3, m].

    Over this rank's real columns; a label that is not here has logit -inf, and no columns at all
    have the lowest finite maximum and sum 0.  `logits` [m, v] contiguous, `labels` int64 [m].

    Raises:
        LitesparkError: shapes, dtypes or strides that do not fit.
    """
    _check_rows(logits_mv, labels_m, None, shard)
    if not runs_kernel(logits_mv):
        return _reference_statistics(logits_mv, labels_m, shard)
    num_rows, num_columns = logits_mv.shape
    statistics_3m = logits_mv.new_empty((3, num_rows), dtype=torch.float32)
    _statistics_kernel[(num_rows,)](
        logits_mv,
        labels_m,
        statistics_3m,
        shard.first_token,
        shard.num_real,
        num_columns,
        num_rows,
        **_tile_options(config or CANDIDATES["statistics"][0]),
    )
    return statistics_3m


def finish_rows_(
    logits_mv: Tensor,
    statistics_r3m: Tensor | None,
    labels_m: Tensor,
    loss_weights_m: Tensor,
    shard: VocabularyShard,
    *,
    with_gradient: bool = True,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Losses, fp32 [m], from all ranks' `row_statistics` [r, 3, m]; logits become their gradient.

    The gradient is that of sum(loss_weights * losses), in the logits' dtype.  Without
    `with_gradient` the logits are left as they are.  Without statistics the rows are taken to hold
    the whole vocabulary, and the same kernel takes them ("whole" of `CANDIDATES`).

    Raises:
        LitesparkError: shapes, dtypes or strides that do not fit.
    """
    _check_rows(logits_mv, labels_m, loss_weights_m, shard)
    if statistics_r3m is not None:
        _check_statistics(logits_mv, statistics_r3m)
    if not runs_kernel(logits_mv):
        if statistics_r3m is None:
            statistics_r3m = _reference_statistics(logits_mv, labels_m, shard)[None]
        return _reference_finish_(
            logits_mv, statistics_r3m, labels_m, loss_weights_m, shard, with_gradient
        )
    num_rows, num_columns = logits_mv.shape
    whole = statistics_r3m is None
    num_ranks = 1 if statistics_r3m is None else statistics_r3m.size(0)
    losses_m = torch.empty_like(loss_weights_m)
    _finish_kernel[(num_rows,)](
        logits_mv,
        statistics_r3m,
        labels_m,
        loss_weights_m,
        losses_m,
        shard.first_token,
        shard.num_real,
        num_columns,
        num_rows,
        num_ranks,
        **_tile_options(
            config or CANDIDATES["whole" if whole else "gradient"][0],
            WHOLE=whole,
            BLOCK_R=triton.next_power_of_2(num_ranks),
            WITH_GRADIENT=with_gradient,
        ),
    )
    return losses_m


def linear_cross_entropy(
    hidden_mh: Tensor,
    weight_vh: Tensor,
    labels_m: Tensor,
    loss_weights_m: Tensor,
    shard: VocabularyShard,
    *,
    chunk_tokens: int = 4096,
) -> tuple[Tensor, Tensor]:
    """sum(loss_weights * losses), an fp32 scalar, and the losses, fp32 [m], which have no gradient.

    Differentiable with respect to `hidden` [m, h] and `weight` [v, h], both of one dtype; logits
    and their gradient are held in it, for `chunk_tokens` tokens at a time.  The weight's gradient
    is summed in fp32 and added to `weight.main_grad` where there is one (weight_gradient.py).
    Without gradient mode, or where neither needs a gradient, only the losses are computed.

    Under tensor parallelism every rank passes the same tokens and its shard of the weight, and gets
    the same losses.  The gradient of `hidden` is then this rank's *partial* sum over its tokens of
    the vocabulary: the caller hands in the output of megatron-core's
    `copy_to_tensor_model_parallel_region` or, under sequence parallelism,
    `gather_from_sequence_parallel_region`, whose backward reduces it.

    Args:
        hidden_mh: the final norm's output.
        weight_vh: this rank's rows of the LM head.
        labels_m: int64 tokens; one that is no real token of any rank gives loss 0 and no gradient.
        loss_weights_m: fp32; a token of weight 0 gives no gradient, whatever its label.
        shard: which tokens the weight's rows are.
        chunk_tokens: rows of logits held at a time.

    Raises:
        LitesparkError: shapes, dtypes or strides that do not fit.
    """
    check_head(hidden_mh, weight_vh, chunk_tokens)
    check_tokens(hidden_mh, labels_m, loss_weights_m)
    if torch.is_grad_enabled() and (hidden_mh.requires_grad or weight_vh.requires_grad):
        return _LinearCrossEntropy.apply(
            hidden_mh, weight_vh, labels_m, loss_weights_m, shard, chunk_tokens
        )
    needs = (False, False)
    losses_m, _, _ = losses_and_gradients(
        hidden_mh, weight_vh, labels_m, loss_weights_m, shard, chunk_tokens, needs
    )
    return (losses_m * loss_weights_m).sum(), losses_m


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_mh: Tensor,
        weight_vh: Tensor,
        labels_m: Tensor,
        loss_weights_m: Tensor,
        shard: VocabularyShard,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:2]
        losses_m, dhidden_mh, dweight_vh = losses_and_gradients(
            hidden_mh, weight_vh, labels_m, loss_weights_m, shard, chunk_tokens, needs
        )
        ctx.save_for_backward(dhidden_mh, dweight_vh)
        ctx.weight = weight_vh  # for its main_grad; its values are not needed any more
        ctx.mark_non_differentiable(losses_m)
        return (losses_m * loss_weights_m).sum(), losses_m

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_mh, dweight_vh = ctx.saved_tensors
        # Of shape [1, 1] it takes part in the choice of the dtype, fp32; a scalar would be rounded
        # to bf16 first on CUDA, and with it all gradients below.
        upstream = gradients[0].reshape(1, 1)
        hidden_gradient = weight_gradient = None
        if dhidden_mh is not None:
            hidden_gradient = torch.empty_like(dhidden_mh)
            torch.mul(dhidden_mh, upstream, out=hidden_gradient)
        if dweight_vh is not None:
            weight_gradient = _deliver(ctx.weight, dweight_vh, upstream)
        return hidden_gradient, weight_gradient, None, None, None, None


def _deliver(weight_vh: Tensor, dweight_vh: Tensor, upstream: Tensor) -> Tensor:
    """`deliver_weight_gradient` of dweight * upstream, without a pass for the product."""
    main_grad = main_grad_of(weight_vh)
    if main_grad is None:
        return (dweight_vh * upstream).to(weight_vh.dtype)
    main_grad.addcmul_(dweight_vh, upstream)
    return added_to_main_grad(weight_vh)


def losses_and_gradients(
    hidden_mh: Tensor,
    weight_vh: Tensor,
    labels_m: Tensor,
    loss_weights_m: Tensor,
    shard: VocabularyShard,
    chunk_tokens: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses, and the gradients of hidden and weight (fp32) that `needs` asks for."""
    num_tokens, num_columns = hidden_mh.size(0), weight_vh.size(0)
    losses_m = torch.empty_like(loss_weights_m)
    dhidden_mh = hidden_mh.new_empty(hidden_mh.shape) if needs[0] else None
    dweight_vh = weight_vh.new_zeros(weight_vh.shape, dtype=torch.float32) if needs[1] else None
    buffer_mv = hidden_mh.new_empty((min(chunk_tokens, num_tokens), num_columns))
    for start in range(0, num_tokens, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_ch = hidden_mh[chunk]
        logits_cv = torch.mm(hidden_ch, weight_vh.t(), out=buffer_mv[: hidden_ch.size(0)])
        losses_m[chunk] = _finish_chunk_(
            logits_cv, labels_m[chunk], loss_weights_m[chunk], shard, any(needs)
        )
        if dhidden_mh is not None:
            torch.mm(logits_cv, weight_vh, out=dhidden_mh[chunk])
        if dweight_vh is not None:
            weight_gradient_added(logits_cv, hidden_ch, dweight_vh)
    return losses_m, dhidden_mh, dweight_vh


def _finish_chunk_(
    logits_mv: Tensor,
    labels_m: Tensor,
    loss_weights_m: Tensor,
    shard: VocabularyShard,
    with_gradient: bool,
) -> Tensor:
    """The losses of a chunk, whose logits become their gradient."""
    gathered_r3m = None
    if shard.group is not None and shard.group.size() > 1:
        statistics_3m = row_statistics(logits_mv, labels_m, shard)
        gathered_r3m = statistics_3m.new_empty((shard.group.size(), *statistics_3m.shape))
        all_gather_into_tensor(gathered_r3m.flatten(0, 1), statistics_3m, group=shard.group)
    return finish_rows_(
        logits_mv, gathered_r3m, labels_m, loss_weights_m, shard, with_gradient=with_gradient
    )


def check_head(hidden_mh: Tensor, weight_vh: Tensor, chunk_tokens: int) -> None:
    """Refuse hidden states and a weight that do not fit each other."""
    fits = hidden_mh.dim() == weight_vh.dim() == 2 and hidden_mh.size(1) == weight_vh.size(1)
    if not fits or hidden_mh.dtype != weight_vh.dtype or chunk_tokens < 1:
        raise LitesparkError(
            "linear_cross_entropy takes hidden [m, h] and weight [v, h] of one dtype, and chunks "
            f"of at least one token; got {hidden_mh.dtype} {tuple(hidden_mh.shape)}, "
            f"{weight_vh.dtype} {tuple(weight_vh.shape)}, and chunks of {chunk_tokens}"
        )


def _check_rows(
    logits_mv: Tensor, labels_m: Tensor, loss_weights_m: Tensor | None, shard: VocabularyShard
) -> None:
    fits = logits_mv.dim() == 2 and 0 <= shard.num_real <= logits_mv.size(1)
    if not fits or not logits_mv.is_contiguous():
        raise LitesparkError(
            "cross-entropy takes contiguous logits [m, v] with up to v real tokens; got "
            f"{tuple(logits_mv.shape)}, strides {logits_mv.stride()}, {shard.num_real} real tokens"
        )
    check_tokens(logits_mv, labels_m, loss_weights_m)


def _check_statistics(logits_mv: Tensor, statistics_r3m: Tensor) -> None:
    expected = (statistics_r3m.size(0), 3, logits_mv.size(0))
    if statistics_r3m.shape != expected or not statistics_r3m.is_contiguous():
        raise LitesparkError(
            f"cross-entropy takes contiguous statistics {expected}; got "
            f"{tuple(statistics_r3m.shape)}, strides {statistics_r3m.stride()}"
        )


def check_tokens(rows: Tensor, labels_m: Tensor, loss_weights_m: Tensor | None) -> None:
    """One label and weight for each row."""
    checked = (("labels", labels_m, torch.int64), ("loss weights", loss_weights_m, torch.float32))
    for name, tensor, dtype in checked:
        if tensor is None:
            continue
        if tensor.shape != rows.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise LitesparkError(
                f"cross-entropy takes contiguous {name}, {dtype} [{rows.size(0)}]; got "
                f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
            )
