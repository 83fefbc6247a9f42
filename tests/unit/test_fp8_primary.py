"""Scales of weights that exist in FP8 alone."""

from __future__ import annotations

import math

import pytest
import torch

from litespark.fp8.linear import HighPrecision, ScaledFp8
from litespark.fp8.primary import PrimaryWeights, dequantized, primary_spec
from litespark.fp8.scaling import Scaling
from litespark.ops.formats import E4M3


def primary_of(*values):
    """Weights with these values, written."""
    parameters = {
        f"weight{index}": torch.nn.Parameter(torch.tensor(each, dtype=torch.bfloat16))
        for index, each in enumerate(values)
    }
    primary = PrimaryWeights(parameters)
    write(primary, parameters, [pending.float() for pending in primary.pending.values()])
    return primary, list(parameters.values())


def write(primary, parameters, masters):
    parameters = parameters.values() if isinstance(parameters, dict) else parameters
    primary.write(
        (
            (master, parameter.detach(), primary_spec(parameter))
            for master, parameter in zip(masters, parameters, strict=True)
        ),
        None,
    )


def test_parameters_become_fp8_and_keep_their_values_until_masters_have_them():
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16))
    parameter.partition_dim = 0
    primary = PrimaryWeights({"weight": parameter})
    assert parameter.dtype == E4M3
    assert parameter.requires_grad
    assert parameter.partition_dim == 0
    assert primary.pending[parameter].tolist() == [[1.0, -2.0]]
    assert dequantized(parameter).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("largest", [1.0, 1.99, 2.0, 0.03, 1e-30, 1e-39, 3e38, 448.0])
def test_scale_is_the_power_of_two_that_puts_the_largest_below_256(largest):
    primary, (parameter,) = primary_of([largest, -largest / 3, 0.0])
    scale = primary.scale_w.item()
    assert math.frexp(scale)[0] == 0.5, "a power of two"
    assert scale * primary.scale_inv_w.item() == 1.0
    stored = parameter.float().abs().max().item()
    bf16 = torch.tensor(largest, dtype=torch.bfloat16).item()
    if bf16 >= 2.0**-118:
        assert 128 <= stored <= 256
    else:
        assert scale == 2.0**126
    assert stored == torch.tensor(bf16 * scale).to(E4M3).item()


def test_what_is_stored_is_the_value_rounded_to_four_bits_whatever_the_scale():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, (small,) = primary_of(values.tolist())
    _, (large,) = primary_of([*values.tolist(), 7.9])
    is_normal = values.abs() > 2.0**-10
    assert torch.equal(dequantized(small)[is_normal], dequantized(large)[:-1][is_normal])
    error = (dequantized(small).float() - values.float()).abs()
    assert (error[is_normal] <= 2.0**-4 * values.float().abs()[is_normal]).all()


def test_next_scales_follow_what_was_recorded():
    primary, (first, second) = primary_of([1.0], [1.0])
    primary_spec(first).amax.fill_(4.0)
    primary_spec(second).amax.fill_(0.25)
    primary.next_scales(None)
    assert primary.scale_w.tolist() == [32.0, 512.0]
    assert primary.scale_inv_w.tolist() == [1 / 32, 1 / 512]
    assert primary.amax_w.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("amax", [0.0, float("nan"), float("inf")])
def test_what_says_nothing_leaves_the_scale(amax):
    primary, (parameter,) = primary_of([1.0])
    before = primary.scale_w.item()
    primary_spec(parameter).amax.fill_(amax)
    primary.next_scales(None)
    assert primary.scale_w.item() == before == 128.0


def test_scales_come_back_for_what_is_written_next():
    """The scale in use, not the one that the masters would give now; unknown weights get theirs."""
    saved_by, (parameter, _) = primary_of([1.0], [1.0])
    write(saved_by, [parameter], [torch.tensor([100.0])])
    state = saved_by.state()
    assert state == {"weight0": [2.0], "weight1": [128.0]}
    loaded, weights = primary_of([3.0], [3.0])
    loaded.load_state({"weight0": state["weight0"], "another": [1.0]})
    assert loaded.scale_w.tolist() == [64.0, 64.0]
    write(loaded, weights, [torch.tensor([100.0]), torch.tensor([100.0])])
    assert loaded.scale_w.tolist() == [2.0, 2.0]
    loaded.load_state({"weight0": [4.0]})
    write(loaded, weights, [torch.tensor([100.0]), torch.tensor([100.0])])
    assert loaded.scale_w.tolist() == [4.0, 2.0]
    assert loaded.amax_w.tolist() == [100.0, 100.0]
    write(loaded, weights, [torch.tensor([100.0]), torch.tensor([100.0])])
    assert loaded.scale_w.tolist() == [2.0, 2.0], "used once"


@pytest.mark.parametrize("scale", [[], [0.0], [-1.0], [math.inf], [math.nan], [1e-40]])
def test_a_scale_that_cannot_be_is_not_taken(scale):
    primary, weights = primary_of([1.0])
    primary.load_state({"weight0": scale})
    write(primary, weights, [torch.tensor([1.0])])
    assert primary.scale_w.tolist() == [128.0]


def test_products_with_it_are_those_with_its_value():
    """In FP8 as with a BF16 weight of the same value and scale; in BF16 exactly."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(32, 16, generator=generator).tolist()
    _, (weight,) = primary_of(values)
    x = torch.randn(16, 16, generator=generator).bfloat16()
    same = torch.nn.Parameter(dequantized(weight).clone())
    plain = HighPrecision()
    assert torch.equal(plain.forward(x, weight), plain.forward(x, same))
    dy = torch.randn(16, 32, generator=generator).bfloat16()
    assert torch.equal(plain.input_gradient(dy, weight), plain.input_gradient(dy, same))
    scaling = Scaling(delayed=False)
    linear = ScaledFp8(scaling, "linear")
    scaling.allocate(torch.device("cpu"))
    linear.refresh(weight)
    found = linear.forward(linear.input_operand(x), weight)
    gradient = linear.input_gradient(linear.gradient_operand(dy), weight)
    assert found.dtype == gradient.dtype == torch.bfloat16
    # Of the operands only x and dy are rounded, to 2^-4 and 2^-3 of themselves.
    wanted, bound = x.float() @ same.float().t(), x.float().abs() @ same.float().abs().t()
    assert ((found.float() - wanted).abs() <= 2.0**-4 * bound + 2.0**-8 * wanted.abs()).all()
    wanted, bound = dy.float() @ same.float(), dy.float().abs() @ same.float().abs()
    assert ((gradient.float() - wanted).abs() <= 2.0**-3 * bound + 2.0**-8 * wanted.abs()).all()
