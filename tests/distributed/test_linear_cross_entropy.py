"""The LM head's cross-entropy over tensor-parallel ranks against one process.

All is fp32; the sums over hidden sizes, vocabulary and tokens have up to a hundred terms, of size 1
at most but for the logits (10), in another order: 2^-17 bounds the difference with room.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor

from litespark.ops.dispatch import kernels_on_cpu
from litespark.ops.linear_cross_entropy import VocabularyShard, linear_cross_entropy
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

NUM_TOKENS, HIDDEN_SIZE, NUM_ROWS = 22, 16, 64
FACTOR = 0.3
BOUND = 2**-17


def head(num_real: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the whole weight, labels, and loss weights; alike on every rank."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=generator)
    labels = torch.randint(num_real, (NUM_TOKENS,), generator=generator)
    loss_weights = torch.rand(NUM_TOKENS, generator=generator)
    labels[3], loss_weights[3] = -100, 0.0
    loss_weights[7] = 0.0
    return hidden, weight, labels, loss_weights


def results(num_real: int, shard: VocabularyShard, num_rows: int) -> Any:
    """Loss sum, losses, what the layers below get, and the weight's gradient."""
    hidden, weight, labels, loss_weights = head(num_real)
    inputs = copied = hidden.requires_grad_()
    if shard.group is not None:
        copied = copy_to_tensor_model_parallel_region(inputs, group=shard.group)
    first = shard.first_token
    parameter: Any = torch.nn.Parameter(weight[first : first + num_rows].clone())
    parameter.main_grad = torch.zeros_like(parameter.data)
    with torch.no_grad():
        evaluated, _ = linear_cross_entropy(
            copied, parameter, labels, loss_weights, shard, chunk_tokens=8
        )
    loss_sum, losses = linear_cross_entropy(
        copied, parameter, labels, loss_weights, shard, chunk_tokens=8
    )
    assert torch.equal(evaluated, loss_sum)
    (loss_sum * FACTOR).backward()
    assert inputs.grad is not None
    found = (loss_sum.detach(), losses, inputs.grad, parameter.main_grad)
    return [tensor.numpy() for tensor in found]


def rank_results(rank: int, world_size: int, num_real: int, kernels: bool) -> Any:
    torch.distributed.init_process_group("gloo")
    rows = NUM_ROWS // world_size
    first = rank * rows
    shard = VocabularyShard(
        first_token=first,
        num_real=min(max(num_real - first, 0), rows),
        group=torch.distributed.group.WORLD,
    )
    with kernels_on_cpu() if kernels else nullcontext():
        return results(num_real, shard, rows)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("world_size", "num_real"),
    [
        (2, 64),
        (2, 61),
        (2, 30),  # rank 1 holds nothing but padding
        (4, 61),
        (4, 32),  # ranks 2 and 3
    ],
)
def test_ranks_equal_a_single_process(world_size, num_real, kernels):
    if kernels:
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
        if torch.cuda.is_available():
            pytest.skip("interprets the kernels; on a GPU tests/kernels runs them")
    whole = VocabularyShard(first_token=0, num_real=num_real, group=None)
    single = results(num_real, whole, NUM_ROWS)
    wanted_sum, wanted_losses, wanted_hidden, wanted_weight = map(torch.from_numpy, single)
    assert wanted_hidden.abs().max() > 0.1
    assert wanted_weight[num_real:].abs().sum() == 0

    ranks = run_distributed(rank_results, world_size, num_real, kernels)
    ranks = [[torch.as_tensor(array) for array in arrays] for arrays in ranks]
    for loss_sum, losses, dhidden, _ in ranks:
        assert torch.equal(loss_sum, ranks[0][0]), "ranks disagree on the loss"
        assert torch.equal(losses, ranks[0][1]), "ranks disagree on the losses"
        torch.testing.assert_close(loss_sum, wanted_sum, rtol=BOUND, atol=0)
        torch.testing.assert_close(losses, wanted_losses, rtol=BOUND, atol=BOUND)
        torch.testing.assert_close(dhidden, wanted_hidden, rtol=0, atol=BOUND)
    dweight = torch.cat([arrays[3] for arrays in ranks])
    torch.testing.assert_close(dweight, wanted_weight, rtol=0, atol=BOUND)
    assert not dweight[num_real:].any()
