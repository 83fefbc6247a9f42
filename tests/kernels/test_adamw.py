"""One AdamW step against `torch.optim.AdamW`, the specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from litespark.errors import LitesparkError
from litespark.ops.adamw import CANDIDATES, AdamWOptions, adamw_step, adamw_step_reference
from litespark.ops.formats import E4M3, E5M2, QuantizeSpec

OPTIONS = AdamWOptions(lr=1e-2, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, step=1)
SHAPES = [(1,), (7,), (1024,), (1025,), (33, 65), (3, 4096)]

# A step changes a weight by about lr; its rounding: the new moments (three roundings, of which
# those of the second count half), a square root and a division of up to 2 units each, and two
# products: 12 * 2^-24 of the step.  The weight itself is rounded twice, 2^-24 of it each.  Steps
# add up.
ROUNDING = 2**-24


class TorchAdamW:
    """The same parameter in torch's optimizer."""

    def __init__(self, master, options, dtype=torch.float64):
        self.parameter = torch.nn.Parameter(master.to(dtype))
        self.optimizer = torch.optim.AdamW(
            [self.parameter],
            lr=options.lr,
            betas=options.betas,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
        )

    def step(self, grad):
        self.parameter.grad = grad.to(self.parameter.dtype)
        self.optimizer.step()

    def tensors(self):
        state = self.optimizer.state[self.parameter]
        return self.parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def run_steps(shape, device, options, num_steps, step=adamw_step, **arguments):
    """Master, moments and bf16 weight after some steps, and torch's in fp64."""
    master = torch.randn(shape, device=device)
    moments = [torch.zeros_like(master) for _ in range(2)]
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    expected = TorchAdamW(master, options)
    multiplier = torch.tensor([0.25], device=device)
    for number in range(1, num_steps + 1):
        grad = torch.randn(shape, device=device) * 10.0 ** (1 - number)
        before = grad.clone()
        numbered = replace(options, step=number)
        step(master, grad, *moments, numbered, weight=weight, multiplier=multiplier, **arguments)
        assert torch.equal(grad, before)
        expected.step(grad * 0.25)  # exact: a power of two
    return (master, *moments), weight, expected.tensors()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [adamw_step, adamw_step_reference], ids=["kernel", "reference"])
def test_equals_torch(shape, step, device):
    num_steps = 4
    found, weight, expected = run_steps(shape, device, OPTIONS, num_steps, step)
    bound = num_steps * ROUNDING * (2 * expected[0].abs() + 12 * OPTIONS.lr)
    assert ((found[0].double() - expected[0]).abs() <= bound).all()
    # Moments: three roundings a step, relative to the largest that went into the sum.
    for moment, wanted in zip(found[1:], expected[1:], strict=True):
        bound = 3 * num_steps * ROUNDING * wanted.abs().max()
        assert ((moment.double() - wanted).abs() <= bound).all()
    assert torch.equal(weight, found[0].to(torch.bfloat16))


@pytest.mark.parametrize("config", CANDIDATES["step"], ids=str)
def test_every_configuration_computes_the_same(config, device):
    torch.manual_seed(1)
    expected, _, _ = run_steps((5001,), device, OPTIONS, 2)
    torch.manual_seed(1)
    found, weight, _ = run_steps((5001,), device, OPTIONS, 2, config=config)
    for tensor, wanted in zip(found, expected, strict=True):
        assert torch.equal(tensor, wanted)
    assert torch.equal(weight, found[0].to(torch.bfloat16))


def test_late_step_without_weight_and_multiplier(device):
    """Moments that are full, at step 1000; no model weight and no multiplier."""
    options = AdamWOptions(lr=3e-4, betas=(0.9, 0.999), epsilon=1e-5, weight_decay=0.0, step=1000)
    master, grad = torch.randn(2, 300, device=device)
    exp_avg, exp_avg_sq = torch.randn_like(grad) / 4, torch.rand_like(grad)
    expected = TorchAdamW(master, options)
    expected.optimizer.state[expected.parameter] = {
        "step": torch.tensor(999.0),
        "exp_avg": exp_avg.double(),
        "exp_avg_sq": exp_avg_sq.double(),
    }
    adamw_step(master, grad, exp_avg, exp_avg_sq, options)
    expected.step(grad)
    wanted, wanted_avg, wanted_avg_sq = expected.tensors()
    assert ((master - wanted).abs() <= ROUNDING * (2 * wanted.abs() + 12 * options.lr)).all()
    assert ((exp_avg - wanted_avg).abs() <= 3 * ROUNDING * wanted_avg.abs().max()).all()
    assert ((exp_avg_sq - wanted_avg_sq).abs() <= 3 * ROUNDING * wanted_avg_sq.max()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradients_stay_bad_and_alone(bad, device):
    master, grad = torch.randn(2, 100, device=device)
    exp_avg, exp_avg_sq = torch.zeros(2, 100, device=device)
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    grad[17] = bad
    adamw_step(master, grad, exp_avg, exp_avg_sq, OPTIONS, weight=weight)
    is_bad = torch.arange(100, device=device) == 17
    for tensor in (master, weight):
        assert torch.equal(tensor.isnan(), is_bad)
    assert torch.equal(~exp_avg_sq.isfinite(), is_bad)


@pytest.mark.parametrize(
    "function", [adamw_step, adamw_step_reference], ids=["kernel", "reference"]
)
def test_weight_is_rounded_to_the_nearest_even(function, device):
    """Neighbours of the middle between two bf16 numbers, and the middle itself."""
    low, step = 1.0, 2.0**-7
    middle = low + step / 2
    master = torch.tensor([middle - 2**-23, middle, middle + 2**-23, middle + step], device=device)
    still = [torch.zeros_like(master) for _ in range(3)]
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    function(master, *still, replace(OPTIONS, weight_decay=0.0), weight=weight)
    assert weight.tolist() == [low, low, low + step, low + 2 * step]


STEPS = [
    pytest.param(adamw_step, id="kernel"),
    pytest.param(adamw_step_reference, id="reference"),
]


def fp8_spec(scale, device, dtype=E4M3):
    scale = torch.tensor([scale], device=device)
    return QuantizeSpec(dtype, scale, 1 / scale, torch.zeros(1, device=device))


@pytest.mark.parametrize("shape", [(1,), (7,), (1025,), (33, 65)], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_fp8_weight_is_the_new_master_rounded_once(shape, step, device):
    """Values beyond 448 saturate; the largest |master| is that of the new values, unclamped."""
    torch.manual_seed(2)
    expected, _, _ = run_steps(shape, device, OPTIONS, 1)
    torch.manual_seed(2)
    master = torch.randn(shape, device=device)
    spec = fp8_spec(512.0, device)  # of values around 1: about half of them saturate
    weight = torch.empty(shape, device=device, dtype=E4M3)
    moments = [torch.zeros_like(master) for _ in range(2)]
    multiplier = torch.tensor([0.25], device=device)
    grad = torch.randn(shape, device=device)
    step(master, grad, *moments, OPTIONS, weight=weight, quantize=spec, multiplier=multiplier)
    assert ((master - expected[0]).abs() <= 14 * ROUNDING * (expected[0].abs() + 0.01)).all()
    wanted = (master * 512.0).clamp(-448, 448).to(E4M3)
    assert torch.equal(weight.view(torch.uint8), wanted.view(torch.uint8))
    if master.numel() > 100:
        assert 0.2 < (weight.float().abs() == 448).float().mean() < 0.8
    assert spec.amax.item() == master.abs().max().item()
    assert spec.scale.item() == 512.0


@pytest.mark.parametrize("step", STEPS)
def test_largest_value_is_raised_and_never_lowered(step, device):
    """As of the parts of one weight, which are written by several launches."""
    spec = fp8_spec(1.0, device)
    for value, wanted in ((2.0, 2.0), (-3.0, 3.0), (1.0, 3.0)):
        master = torch.full((5,), value, device=device)
        still = [torch.zeros_like(master) for _ in range(3)]
        weight = torch.empty_like(master, dtype=E4M3)
        options = replace(OPTIONS, weight_decay=0.0)
        step(master, *still, options, weight=weight, quantize=spec)
        assert weight.tolist() == [value] * 5
        assert spec.amax.item() == wanted


@pytest.mark.parametrize("step", STEPS)
def test_nan_in_an_fp8_weight_stays_alone(step, device):
    master, grad = torch.randn(2, 100, device=device)
    moments = [torch.zeros_like(master) for _ in range(2)]
    weight = torch.empty_like(master, dtype=E4M3)
    grad[17] = float("nan")
    spec = fp8_spec(64.0, device)
    step(master, grad, *moments, OPTIONS, weight=weight, quantize=spec)
    assert weight.float().isnan().nonzero().flatten().tolist() == [17]
    amax = spec.amax.item()
    assert amax != amax or amax == master.nan_to_num(nan=0.0).abs().max().item()


def test_scale_and_format_belong_together(device):
    good = torch.zeros(4, device=device)
    for weight, spec in (
        (good.to(E4M3), None),
        (good.bfloat16(), fp8_spec(1.0, device)),
        (good.to(E5M2), fp8_spec(1.0, device)),
        (None, fp8_spec(1.0, device)),
    ):
        with pytest.raises(LitesparkError, match="scale of its format"):
            adamw_step(good, good, good, good, OPTIONS, weight=weight, quantize=spec)


def test_wrong_tensors_are_refused(device):
    good = torch.zeros(4, 6, device=device)
    for wrong in (good.t(), good[:2], good.bfloat16(), torch.zeros(6, 4, device=device).t()):
        for position in range(1, 4):
            tensors = [good] * 4
            tensors[position] = wrong
            with pytest.raises(LitesparkError, match="contiguous"):
                adamw_step(*tensors, OPTIONS)
    with pytest.raises(LitesparkError, match="contiguous"):
        adamw_step(good, good, good, good, OPTIONS, weight=good.bfloat16()[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no queue to wait for")
def test_host_does_not_wait_and_a_new_rate_compiles_nothing(device):
    from litespark.ops.adamw import _adamw_kernel

    master, grad = torch.randn(2, 1000, device=device)
    exp_avg, exp_avg_sq = torch.zeros(2, 1000, device=device)
    multiplier = torch.ones(1, device=device)
    counts = []
    for number in (1, 2):
        options = replace(OPTIONS, lr=1.0 / number, step=number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            adamw_step(master, grad, exp_avg, exp_avg_sq, options, multiplier=multiplier)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum(len(entry[0]) for entry in _adamw_kernel.device_caches.values()))
    assert counts[0] == counts[1]
