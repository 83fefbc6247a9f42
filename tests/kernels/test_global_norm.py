"""The sum of squares of all gradients against fp64."""

from __future__ import annotations

import pytest
import torch

from litespark.errors import LitesparkError
from litespark.ops.global_norm import (
    CANDIDATES,
    DEFAULT,
    _joined,
    sum_of_squares,
    sum_of_squares_reference,
)

SPAN = DEFAULT.block_m * DEFAULT.block_n
# Squares are rounded (2^-24 each), and added in fp32 in a chain of `block_m` and a tree of at most
# 12 levels: all terms are positive, so that no sum is further off than 2^-24 a level.
RELATIVE_BOUND = (1 + 16 + 12) * 2**-24


def wanted(tensors):
    return sum(tensor.double().square().sum().item() for tensor in tensors)


@pytest.mark.parametrize(
    "shapes",
    [
        [(1,)],
        [(SPAN,)],
        [(SPAN + 1,), (3, 5)],
        [(SPAN - 1,), (0,), (2 * SPAN, 2)],
        [(17,)] * 5,
    ],
    ids=str,
)
def test_equals_fp64(shapes, device):
    tensors = [torch.randn(shape, device=device) * 3 for shape in shapes]
    found = sum_of_squares(tensors, device)
    assert found.shape == (1,)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(wanted(tensors), rel=RELATIVE_BOUND)
    assert sum_of_squares_reference(tensors, device).item() == pytest.approx(wanted(tensors))


@pytest.mark.parametrize("config", CANDIDATES["sum_of_squares"], ids=str)
def test_every_configuration(config, device):
    tensors = [torch.randn(70001, device=device)]
    found = sum_of_squares(tensors, device, config=config)
    assert found.item() == pytest.approx(wanted(tensors), rel=RELATIVE_BOUND)


def test_parts_of_a_buffer_are_each_counted_once(device):
    """In any order and with gaps between, as gradients lie in megatron-core's buffers."""
    buffer = torch.randn(4 * SPAN, device=device)
    buffer[1000:1064] = 1e6  # a gap: not part of any gradient
    other = torch.randn(77, device=device)
    parts = [
        buffer[1064:SPAN],
        buffer[:1000].view(10, 100),
        other,
        buffer[SPAN : 3 * SPAN + 5].view(1, -1),
        buffer[3 * SPAN + 5 :],
    ]
    found = sum_of_squares(parts, device)
    assert found.item() == pytest.approx(wanted(parts), rel=RELATIVE_BOUND)
    assert [run.numel() for run in _joined(parts)] == [1000, 4 * SPAN - 1064, 77]


def test_the_same_tensor_twice_counts_twice(device):
    tensor = torch.randn(100, device=device)
    found = sum_of_squares([tensor, tensor], device)
    assert found.item() == pytest.approx(2 * wanted([tensor]), rel=RELATIVE_BOUND)


def test_repeats_to_the_last_bit(device):
    buffer = torch.randn(5 * SPAN + 3, device=device)
    parts = list(buffer.split([SPAN + 1, 2 * SPAN, 2 * SPAN + 2]))
    first = sum_of_squares(parts, device)
    copies = [part.clone() for part in parts]
    assert torch.equal(first, sum_of_squares(parts, device))
    assert torch.equal(sum_of_squares(copies, device), sum_of_squares(copies, device))


def test_no_tensors_at_all(device):
    assert sum_of_squares([], device).tolist() == [0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_show(bad, device):
    values = torch.randn(SPAN + 9, device=device)
    values[-1] = bad
    assert not sum_of_squares([values], device).isfinite().any()


def test_wrong_tensors_are_refused(device):
    for wrong in (torch.zeros(4, 6, device=device).t(), torch.zeros(4).bfloat16().to(device)):
        with pytest.raises(LitesparkError, match="contiguous fp32"):
            sum_of_squares([wrong], device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no queue to wait for")
def test_host_does_not_wait(device):
    tensors = [torch.randn(SPAN, device=device)]
    sum_of_squares(tensors, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum_of_squares(tensors, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
