"""The LM head's cross-entropy: kernels and reference against torch's, in fp64 on the full logits.

Bounds: an exponential is good to 2^-22, a sum of a few hundred of them to about 2^-20, and so are
the softmax and, absolutely, its logarithm; 2^-18 leaves room.  A bf16 gradient is off by one
rounding, 2^-9, on a GPU and 2^-8 relative to the next power of two, so 2^-7, in Triton's
interpreter, which truncates.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import litespark.ops.linear_cross_entropy as module
from litespark.errors import LitesparkError
from litespark.ops.dispatch import LaunchConfig
from litespark.ops.linear_cross_entropy import (
    CANDIDATES,
    VocabularyShard,
    finish_rows_,
    linear_cross_entropy,
    row_statistics,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf and NaN

FP32 = 2**-18
ROUNDING = {torch.float32: FP32, torch.bfloat16: 2**-7}
# Rows of a few hundred columns then take several full tiles, of several strips, and a rest.
SMALL = LaunchConfig(2, 16)


def whole(num_real: int) -> VocabularyShard:
    return VocabularyShard(first_token=0, num_real=num_real, group=None)


def rows(num_rows: int, num_columns: int, num_real: int, dtype: torch.dtype, device, scale=3.0):
    """Logits, labels and weights; some weights are 0."""
    logits = (torch.randn(num_rows, num_columns, device=device) * scale).to(dtype)
    labels = torch.randint(num_real, (num_rows,), device=device)
    weights = torch.rand(num_rows, device=device)
    weights[1::3] = 0.0
    return logits, labels, weights


def expected(logits: Tensor, labels: Tensor, weights: Tensor, num_real: int):
    """Losses, and the gradient of their weighted sum; fp64."""
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact[:, :num_real], labels, reduction="none")
    (gradient,) = torch.autograd.grad((losses * weights.double()).sum(), exact)
    return losses.detach(), gradient


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype) -> None:
    losses, gradient = found
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), wanted[0], rtol=FP32, atol=FP32)
    # Of a softmax of nearly 1 the difference from 1 is good to its last digits only, hence atol.
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=ROUNDING[dtype], atol=2**-22)


SHAPES = [(1, 1, 1), (3, 37, 37), (5, 200, 137), (2, 96, 64), (4, 97, 96), (2, 130, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_columns", "num_real"), SHAPES)
def test_whole_rows(device, dtype, num_rows, num_columns, num_real) -> None:
    logits, labels, weights = rows(num_rows, num_columns, num_real, dtype, device)
    wanted = expected(logits, labels, weights, num_real)
    for config in (SMALL, None):
        given = logits.clone()
        losses = finish_rows_(given, None, labels, weights, whole(num_real), config=config)
        assert_same((losses, given), wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_columns", "num_real"), SHAPES)
def test_reference(dtype, num_rows, num_columns, num_real) -> None:
    logits, labels, weights = rows(num_rows, num_columns, num_real, dtype, "cpu")
    wanted = expected(logits, labels, weights, num_real)
    losses = finish_rows_(logits, None, labels, weights, whole(num_real))
    assert_same((losses, logits), wanted, dtype)


# Local widths; the last shard's padding, so that a shard can hold nothing else.
SHARDINGS = [([40, 40, 40], 0), ([33, 70], 5), ([50, 50, 16], 16), ([48, 20, 20, 20, 20], 20)]


def sharded(logits: Tensor, labels: Tensor, weights: Tensor, widths, padding, config=None):
    """What ranks with these shares of the columns compute together: losses and gradient."""
    parts = [part.contiguous() for part in logits.split(widths, dim=1)]
    shards, first = [], 0
    for rank, width in enumerate(widths):
        num_real = width - (padding if rank == len(widths) - 1 else 0)
        shards.append(VocabularyShard(first, num_real, None))
        first += width
    statistics = torch.stack(
        [row_statistics(p, labels, s, config) for p, s in zip(parts, shards, strict=True)]
    )
    losses = [
        finish_rows_(p, statistics, labels, weights, s, config=config)
        for p, s in zip(parts, shards, strict=True)
    ]
    for other in losses:
        torch.testing.assert_close(other, losses[0], rtol=0, atol=0, equal_nan=True)
    return losses[0], torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("widths", "padding"), SHARDINGS)
def test_shards(device, dtype, widths, padding) -> None:
    num_real = sum(widths) - padding
    logits, labels, weights = rows(6, sum(widths), num_real, dtype, device)
    labels[0], labels[1] = 0, num_real - 1
    wanted = expected(logits, labels, weights, num_real)
    for config in (SMALL, None):
        assert_same(sharded(logits, labels, weights, widths, padding, config), wanted, dtype)


@pytest.mark.parametrize(("widths", "padding"), SHARDINGS)
def test_reference_of_shards(widths, padding) -> None:
    num_real = sum(widths) - padding
    logits, labels, weights = rows(6, sum(widths), num_real, torch.float32, "cpu")
    wanted = expected(logits, labels, weights, num_real)
    assert_same(sharded(logits, labels, weights, widths, padding), wanted, torch.float32)


@pytest.mark.parametrize("num_columns", [32768 + 5, 262144])
def test_large_vocabulary(device, num_columns) -> None:
    logits, labels, weights = rows(1, num_columns, num_columns - 3, torch.bfloat16, device)
    wanted = expected(logits, labels, weights, num_columns - 3)
    losses = finish_rows_(logits, None, labels, weights, whole(num_columns - 3))
    assert_same((losses, logits), wanted, torch.bfloat16)


def test_large_logits(device) -> None:
    """Logits of 1e4, where their logarithm of a sum keeps three decimals in fp32."""
    logits, labels, weights = rows(4, 90, 90, torch.float32, device, scale=1.0)
    logits += 1e4
    wanted = expected(logits, labels, weights, 90)
    for found in (
        (finish_rows_(given := logits.clone(), None, labels, weights, whole(90)), given),
        sharded(logits, labels, weights, [40, 50], 0),
    ):
        assert_same(found, wanted, torch.float32)


@pytest.mark.parametrize("config", CANDIDATES["whole"])
def test_candidates_of_whole_rows(device, config) -> None:
    logits, labels, weights = rows(2, 9001, 8999, torch.bfloat16, device)
    wanted = expected(logits, labels, weights, 8999)
    losses = finish_rows_(logits, None, labels, weights, whole(8999), config=config)
    assert_same((losses, logits), wanted, torch.bfloat16)


@pytest.mark.parametrize("key", ["statistics", "gradient"])
def test_candidates_of_shards(device, key) -> None:
    logits, labels, weights = rows(2, 9001, 8999, torch.bfloat16, device)
    wanted = expected(logits, labels, weights, 8999)
    for config in CANDIDATES[key]:
        found = sharded(logits, labels, weights, [4500, 4501], 2, config)
        assert_same(found, wanted, torch.bfloat16)


def test_without_gradient_logits_stay(device) -> None:
    logits, labels, weights = rows(3, 50, 45, torch.bfloat16, device)
    wanted, _ = expected(logits, labels, weights, 45)
    given = logits.clone()
    statistics = row_statistics(given, labels, whole(45))[None]
    for taken in (None, statistics):
        losses = finish_rows_(given, taken, labels, weights, whole(45), with_gradient=False)
        torch.testing.assert_close(losses.double(), wanted, rtol=FP32, atol=FP32)
        assert torch.equal(given, logits)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [3, 70, 99])
def test_a_logit_that_is_not_finite(request, kernel, value, column) -> None:
    """The row's loss is NaN, whatever its label; nothing else is, and padding does not count."""
    device = request.getfixturevalue("device") if kernel else torch.device("cpu")
    logits, labels, weights = rows(4, 110, 100, torch.float32, device)
    labels[1], labels[2] = column, -100
    logits[:3, column] = value
    logits[3, 100] = value
    wanted, _ = expected(logits[3:], labels[3:], weights[3:], 100)
    for losses in (
        finish_rows_(logits.clone(), None, labels, weights, whole(100), config=SMALL),
        sharded(logits, labels, weights, [50, 60], 10)[0],
    ):
        assert losses[:3].isnan().all()
        torch.testing.assert_close(losses[3:].double(), wanted, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("label", [-100, -1, 100, 109, 2**32 + 3, 3 - 2**32])
def test_a_label_that_is_no_token(request, kernel, label) -> None:
    """Loss and gradient are 0, with any weight."""
    device = request.getfixturevalue("device") if kernel else torch.device("cpu")
    logits, labels, weights = rows(2, 110, 100, torch.float32, device)
    labels[:] = label
    weights[0], weights[1] = 0.0, 2.0
    given = logits.clone()
    losses = finish_rows_(given, None, labels, weights, whole(100))
    for found in ((losses, given), sharded(logits, labels, weights, [50, 60], 10)):
        assert not found[0].any()
        assert not found[1].any()


def head(num_tokens: int, hidden_size: int, num_rows: int, num_real: int, dtype, device):
    """Hidden states, weight, labels and loss weights; the logits are of size 1 to 3."""
    hidden = torch.randn(num_tokens, hidden_size, device=device).to(dtype).requires_grad_()
    weight = torch.randn(num_rows, hidden_size, device=device) * 2 / hidden_size**0.5
    weight = weight.to(dtype).requires_grad_()
    labels = torch.randint(num_real, (num_tokens,), device=device)
    loss_weights = torch.rand(num_tokens, device=device)
    loss_weights[::4] = 0.0
    labels[::8] = -100
    return hidden, weight, labels, loss_weights


def expected_head(hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, num_real):
    """Loss sum, losses, and the sum's gradients; fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight[:num_real].t()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    loss_sum = (losses * loss_weights.double()).sum()
    return loss_sum.detach(), losses.detach(), torch.autograd.grad(loss_sum, (hidden, weight))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 4096])
def test_head_in_fp32(request, kernel, chunk_tokens) -> None:
    """Products of 24 terms and sums over 13 tokens: 2^-17 holds them."""
    device = request.getfixturevalue("device") if kernel else torch.device("cpu")
    hidden, weight, labels, loss_weights = head(13, 24, 70, 65, torch.float32, device)
    loss_sum, losses = linear_cross_entropy(
        hidden, weight, labels, loss_weights, whole(65), chunk_tokens=chunk_tokens
    )
    (loss_sum * 0.3).backward()
    wanted_sum, wanted_losses, gradients = expected_head(hidden, weight, labels, loss_weights, 65)
    assert loss_sum.dtype == losses.dtype == torch.float32
    assert loss_sum.shape == ()
    assert not losses.requires_grad
    torch.testing.assert_close(loss_sum.detach().double(), wanted_sum, rtol=2**-17, atol=0)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=2**-17, atol=2**-18)
    for parameter, gradient in zip((hidden, weight), gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad.double(), gradient * 0.3, rtol=0, atol=2**-17)
    assert not hidden.grad[loss_weights == 0].any()  # type: ignore[index]
    assert not weight.grad[65:].any()  # type: ignore[index]


@pytest.mark.parametrize("kernel", [True, False])
def test_head_in_bf16(request, kernel) -> None:
    """Logits up to 8, stored with 2^-9 of them, are off by up to 2^-6, and so are the losses.

    The softmax is off by that share of itself, and each gradient is a sum of such errors: its
    norm, by which it is compared, by 2^-6 too, and by the gradient's own roundings, 2^-7.
    """
    device = request.getfixturevalue("device") if kernel else torch.device("cpu")
    hidden, weight, labels, loss_weights = head(13, 24, 70, 65, torch.bfloat16, device)
    loss_sum, losses = linear_cross_entropy(
        hidden, weight, labels, loss_weights, whole(65), chunk_tokens=5
    )
    loss_sum.backward()
    _, wanted_losses, gradients = expected_head(hidden, weight, labels, loss_weights, 65)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=0, atol=2**-6)
    for parameter, gradient in zip((hidden, weight), gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.bfloat16
        difference = parameter.grad.double() - gradient
        assert difference.norm() <= (2**-6 + 2**-7) * gradient.norm()


def test_gradients_are_multiplied_in_fp32(device) -> None:
    """1/3 rounded to bf16, as CUDA would a scalar, is off by 2^-9, and all gradients with it."""
    hidden, weight, labels, loss_weights = head(9, 16, 40, 40, torch.bfloat16, device)
    gradients = []
    for factor in (1.0, 1 / 3):
        loss_sum, _ = linear_cross_entropy(hidden, weight, labels, loss_weights, whole(40))
        gradients.append(torch.autograd.grad(loss_sum * factor, hidden)[0])
    third = torch.tensor(1 / 3, device=device)
    assert torch.equal(gradients[1], (gradients[0].float() * third).bfloat16())


@pytest.mark.parametrize("tied", [False, True])
def test_added_to_main_grad(device, tied) -> None:
    """Over two micro-batches, in fp32 although the weight is bf16."""
    hidden, weight, labels, loss_weights = head(13, 24, 70, 65, torch.bfloat16, device)
    wide = weight.detach().float().requires_grad_()
    loss_sum, _ = linear_cross_entropy(hidden.float(), wide, labels, loss_weights, whole(65))
    (wanted,) = torch.autograd.grad(loss_sum, wide)

    parameter: Any = torch.nn.Parameter(weight.detach())
    parameter.main_grad = torch.ones(weight.shape, device=device)
    parameter.grad_added_to_main_grad = False
    parameter.zero_out_wgrad = tied
    for factor in (0.25, 0.5):
        loss_sum, _ = linear_cross_entropy(hidden, parameter, labels, loss_weights, whole(65))
        (loss_sum * factor).backward()
    assert parameter.grad_added_to_main_grad
    assert parameter.grad is not None  # DDP's hook fires after it has been set
    if tied:
        assert not parameter.grad.any()
    found = parameter.main_grad - 1
    # The two sums of bf16 logits' gradients differ as in the test above; the factors are exact.
    assert (found - wanted * 0.75).norm() <= (2**-6 + 2**-7) * wanted.norm() * 0.75
    # 2^-10 is far below what a bf16 sum would lose, added to ones.
    assert (found[found != 0].abs() < 2**-10).any()
    assert not found[65:].any()


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_alone(device, wanted) -> None:
    hidden, weight, labels, loss_weights = head(7, 8, 20, 20, torch.float32, device)
    parameter, other = (hidden, weight) if wanted == "hidden" else (weight, hidden)
    both = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, loss_weights, whole(20))[0], parameter
    )[0]
    other.requires_grad_(False)
    loss_sum, _ = linear_cross_entropy(hidden, weight, labels, loss_weights, whole(20))
    loss_sum.backward()
    assert other.grad is None
    assert torch.equal(parameter.grad, both)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_logits_of_a_chunk_at_a_time_and_gradients_when_asked_for(
    device, monkeypatch, training
) -> None:
    calls: list[tuple[int, bool]] = []

    def recorded(logits: Tensor, *arguments, with_gradient: bool) -> Tensor:
        calls.append((logits.size(0), with_gradient))
        return finish_rows_(logits, *arguments, with_gradient=with_gradient)

    monkeypatch.setattr(module, "finish_rows_", recorded)
    hidden, weight, labels, loss_weights = head(13, 8, 20, 20, torch.float32, device)
    with torch.set_grad_enabled(training):
        loss_sum, losses = linear_cross_entropy(
            hidden, weight, labels, loss_weights, whole(20), chunk_tokens=5
        )
    assert loss_sum.requires_grad is training
    assert calls == [(5, training), (5, training), (3, training)]
    wanted_sum, wanted_losses, _ = expected_head(hidden, weight, labels, loss_weights, 20)
    torch.testing.assert_close(loss_sum.detach().double(), wanted_sum, rtol=2**-17, atol=0)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=2**-17, atol=2**-18)


def test_no_tokens(device) -> None:
    hidden, weight, labels, loss_weights = head(0, 8, 20, 20, torch.float32, device)
    loss_sum, losses = linear_cross_entropy(hidden, weight, labels, loss_weights, whole(20))
    loss_sum.backward()
    assert loss_sum == 0
    assert losses.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_what_does_not_fit_is_named() -> None:
    hidden, weight, labels, loss_weights = head(6, 8, 20, 20, torch.float32, "cpu")
    fitting = {
        "hidden_mh": hidden,
        "weight_vh": weight,
        "labels_m": labels,
        "loss_weights_m": loss_weights,
        "shard": whole(20),
    }
    for name, wrong, message in (
        ("hidden_mh", hidden[:, :7], r"\(6, 7\)"),
        ("hidden_mh", hidden[None], r"\(1, 6, 8\)"),
        ("weight_vh", weight.bfloat16(), "of one dtype"),
        ("chunk_tokens", 0, "chunks of 0"),
        ("labels_m", labels.int(), r"contiguous labels, torch.int64 \[6\]; got torch.int32"),
        ("labels_m", labels[:5], r"\(5,\)"),
        ("labels_m", labels.repeat(2)[::2], r"strides \(2,\)"),
        ("loss_weights_m", loss_weights.double(), "loss weights, torch.float32"),
        ("shard", whole(21), "21 real tokens"),
        ("shard", whole(-1), "-1 real tokens"),
    ):
        with pytest.raises(LitesparkError, match=message):
            linear_cross_entropy(**{**fitting, name: wrong})
    with pytest.raises(LitesparkError, match="contiguous logits"):
        row_statistics(torch.zeros(20, 6).t(), labels, whole(20))
    with pytest.raises(LitesparkError, match=r"contiguous statistics \(2, 3, 6\)"):
        finish_rows_(torch.zeros(6, 20), torch.zeros(2, 6, 3), labels, loss_weights, whole(20))
