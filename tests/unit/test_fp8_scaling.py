"""FP8 scales: the delayed rule, what may not enter it, what a margin lowers, what is kept."""

from __future__ import annotations

import json
import math

import pytest
import torch

from litespark.config.schema import PrecisionConfig
from litespark.fp8.policy import PrecisionPolicy
from litespark.fp8.scaling import Scaling
from litespark.ops.formats import E4M3, E5M2, FP8_MAX
from litespark.ops.quantize import LARGEST_SCALE
from tests.support.spawn import run_distributed

CPU = torch.device("cpu")


def scaling_with(*dtypes: torch.dtype, device: torch.device = CPU, **options) -> Scaling:
    scaling = Scaling(**{"delayed": True, **options})
    for number, dtype in enumerate(dtypes):
        scaling.point(f"point{number}", dtype)
    scaling.allocate(device)
    return scaling


def step(scaling: Scaling, *tensors: torch.Tensor, group=None) -> None:
    """Each point quantises its tensor, and the step ends."""
    for point, tensor in zip(scaling.points, tensors, strict=True):
        point.quantize(tensor)
    scaling.end_step(group)


def te_scale(history: list[float], previous: float, fp8_max: float, margin: int) -> float:
    """Transformer Engine's `DelayedScaling(amax_compute_algo="max")`, one tensor, by its text:
    scale = (fp8_max / max(history)) / 2^margin; unchanged where that maximum is 0 or infinite."""
    amax = max(history)
    if not 0 < amax < math.inf:
        return previous
    return fp8_max / amax / 2**margin


# --------------------------------------------------------------------------------- the delayed rule


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("history_steps", [1, 4])
def test_scales_are_transformer_engines(dtype, margin, history_steps):
    """Ten steps; a peak stays for as many steps as are remembered, this one included."""
    scaling = scaling_with(dtype, history_steps=history_steps, margin=margin)
    history, expected = [0.0] * history_steps, 1.0
    for amax in (3.0, 0.5, 80.0, 0.25, 0.0, 1e-3, 2.0, 0.0, 0.0, 7.0):
        step(scaling, torch.tensor([[amax / 2, -amax]]))
        history = [amax, *history[:-1]]
        expected = te_scale(history, expected, FP8_MAX[dtype], margin)
        # Both are one or two roundings in fp32, in another order: 2 units of 2^-24.
        assert float(scaling.scale_p[0]) == pytest.approx(expected, rel=2**-23)
        assert float(scaling.scale_p[0] * scaling.scale_inv_p[0]) == pytest.approx(1, rel=2**-23)
        assert scaling.history_tp[:, 0].tolist() == pytest.approx(history)


def test_the_history_rolls_for_each_point_by_itself():
    scaling = scaling_with(E4M3, E5M2, history_steps=3)
    for number in range(1, 5):
        step(scaling, torch.tensor([[float(number)]]), torch.tensor([[10.0 * number]]))
    assert scaling.history_tp.tolist() == [[4, 40], [3, 30], [2, 20]]
    assert scaling.amax_p.tolist() == [0, 0]
    assert scaling.scale_p.tolist() == pytest.approx([448 / 4, 57344 / 40])


def test_the_largest_of_a_steps_micro_batches_counts():
    scaling = scaling_with(E4M3)
    for largest in (1.0, 5.0, 2.0):
        scaling.points[0].quantize(torch.tensor([[-largest]]))
    scaling.end_step(None)
    assert scaling.scale_p.tolist() == [pytest.approx(448 / 5)]


def test_the_first_step_has_current_scales_and_the_second_the_firsts():
    scaling = scaling_with(E4M3)
    point = scaling.points[0]
    for largest in (3.5, 14.0):  # micro-batches of one step
        assert point.spec() is None
        assert float(point.quantize(torch.tensor([[largest]])).scale_inv) == largest / 448
    scaling.end_step(None)
    later = point.quantize(torch.tensor([[1.0, 100.0]]))
    assert later.dequantize().tolist() == [[1.0, 14.0]], "beyond the prediction it saturates"


def test_a_denormal_tensor_has_a_scale_and_a_reciprocal():
    scaling = scaling_with(E5M2)
    step(scaling, torch.tensor([[1e-42]]))
    assert float(scaling.scale_p[0]) == LARGEST_SCALE
    assert float(scaling.scale_inv_p[0]) == 1 / LARGEST_SCALE


# ------------------------------------------------------------------------- what predicts nothing


@pytest.mark.parametrize("first", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_begins_with_no_number_keeps_current_scales(first, dtype):
    """With a scale of 1, E5M2 makes zeros of what is below 2^-17: a step without gradients."""
    scaling = scaling_with(dtype)
    point = scaling.points[0]
    step(scaling, torch.full((2, 2), first))
    assert point.spec() is None
    small = torch.tensor([[1e-7, -3e-7]])
    # Half a unit of E5M2's 2 bits of mantissa.
    torch.testing.assert_close(point.quantize(small).dequantize(), small, rtol=2**-3, atol=0)
    scaling.end_step(None)
    spec = point.spec()
    assert spec is not None
    assert float(spec.scale) == pytest.approx(FP8_MAX[dtype] / 3e-7)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_one_bad_step_leaves_the_scale_to_the_others(bad):
    """An infinity in the history froze the scale for as long as it was remembered."""
    scaling = scaling_with(E5M2, history_steps=4)
    step(scaling, torch.tensor([[2.0]]))
    step(scaling, torch.tensor([[bad, 1.0]]))
    assert scaling.scale_p.tolist() == [57344 / 2]
    step(scaling, torch.tensor([[64.0]]))
    assert scaling.scale_p.tolist() == [57344 / 64], "the scale follows at the next step"
    assert scaling.history_tp[:, 0].tolist() == [64, 0, 2, 0]


def test_an_unused_point_has_no_history():
    scaling = scaling_with(E4M3, E4M3)
    scaling.points[0].quantize(torch.ones(1, 1))
    scaling.end_step(None)
    assert [point.has_history for point in scaling.points] == [True, False]


def test_an_ordinary_step_does_not_wait_for_the_device():
    """A meta tensor has no values: whoever asks for one fails, as a CUDA tensor's reader waits."""
    scaling = scaling_with(E4M3, E5M2, E4M3, device=torch.device("meta"))
    used, new, _ = scaling.points
    used.has_history = True
    assert used.spec() is not None
    scaling.end_step(None)
    assert not used.was_used
    new.was_used = True
    with pytest.raises((NotImplementedError, RuntimeError)):
        scaling.end_step(None)


# ---------------------------------------------------------------------------------------- margin


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize("margin", [0, 1, 5])
def test_margin_lowers_the_scales_of_both_recipes(recipe, margin):
    """The first step of `delayed` included, whose scales are current ones."""
    scaling = scaling_with(E4M3, delayed=recipe == "delayed", margin=margin)
    values = torch.tensor([[7.0, -1.0]])
    for _ in range(2):
        matrix = scaling.points[0].quantize(values)
        assert float(matrix.scale_inv) == 7.0 * 2**margin / 448
        assert matrix.rows_mk is not None
        assert float(matrix.rows_mk.float().max()) == 448 / 2**margin
        scaling.end_step(None)


def test_a_margin_does_not_enter_what_is_recorded():
    scaling = scaling_with(E4M3, margin=4)
    known = torch.tensor([3.0])
    scaling.points[0].spec_for(torch.tensor([[3.0]]), known)
    assert known.tolist() == [3.0], "the caller's own"
    step(scaling, torch.tensor([[3.0]]))
    assert float(scaling.history_tp[0, 0]) == 3.0


def test_current_scales_keep_no_history():
    scaling = scaling_with(E4M3, delayed=False)
    for largest in (100.0, 1.0):
        matrix = scaling.points[0].quantize(torch.tensor([[largest]]))
        assert float(matrix.scale_inv) == pytest.approx(largest / 448)
        scaling.end_step(None)
    assert scaling.state() == {}


# ----------------------------------------------------------------------------------- checkpoints


def policy_with(layers: list[int], **precision) -> PrecisionPolicy:
    """One pipeline stage's policy of a model of 4 layers."""
    config = PrecisionConfig.model_validate({"mode": "fp8", "recipe": "delayed", **precision})
    policy = PrecisionPolicy(config, 4)
    for number in layers:
        policy.formats(number)
    policy.allocate(CPU)
    return policy


def scales(policy: PrecisionPolicy) -> dict[str, float]:
    assert policy.scaling is not None
    return {point.name: float(policy.scaling.scale_p[point.index]) for point in scaling_of(policy)}


def scaling_of(policy: PrecisionPolicy):
    assert policy.scaling is not None
    return policy.scaling.points


def train(policy: PrecisionPolicy, steps: range) -> None:
    """Every point sees a value of its own name and step, the same in every layout."""
    for number in steps:
        for point in scaling_of(policy):
            seed = sum(map(ord, point.name)) * 7919 + number
            generator = torch.Generator().manual_seed(seed)
            point.quantize(torch.randn(4, 4, generator=generator))
        policy.end_step(None)


@pytest.mark.parametrize("stages", [[[1, 2], [3, 4]], [[1, 3], [2, 4]], [[4], [3, 2, 1]]])
def test_scales_follow_their_layers_to_other_stages(stages):
    """A checkpoint's names are those of the whole model; JSON keeps fp32 exactly."""
    whole = policy_with([1, 2, 3, 4])
    train(whole, range(5))
    saved = json.loads(json.dumps(whole.state()))
    parts = [policy_with(layers) for layers in stages]
    for part in parts:
        part.load_state(saved)
        assert all(point.has_history for point in scaling_of(part))
    assert {k: v for part in parts for k, v in scales(part).items()} == scales(whole)
    for policy in (whole, *parts):
        train(policy, range(5, 8))
    assert {k: v for part in parts for k, v in part.state().items()} == whole.state()
    together = policy_with([2, 1, 4, 3])
    together.load_state({k: v for part in parts for k, v in part.state().items()})
    assert scales(together) == scales(whole)


@pytest.mark.parametrize("history_steps", [2, 8])
def test_another_length_of_the_history_is_taken(history_steps):
    """What is remembered and fits; longer ones are filled up by the steps to come."""
    saved_by = scaling_with(E4M3, history_steps=4)
    for amax in (32.0, 1.0, 4.0, 2.0):
        step(saved_by, torch.tensor([[amax]]))
    loaded = scaling_with(E4M3, history_steps=history_steps)
    loaded.load_state(saved_by.state())
    largest = 4.0 if history_steps == 2 else 32.0
    assert loaded.scale_p.tolist() == [448 / largest]


@pytest.mark.parametrize("history", [[0.0, 0.0], [0.0, math.inf], [math.nan, 0.0], []])
def test_a_saved_history_without_a_number_is_none(history):
    """Checkpoints before this had such points; with `has_history` their scale would be 1."""
    scaling = scaling_with(E5M2)
    scaling.load_state({"point0": [5.0, *history]})
    assert scaling.points[0].spec() is None
    assert scaling.scale_p.tolist() == [1]


def test_points_that_a_checkpoint_lacks_start_with_current_scales():
    scaling = scaling_with(E4M3, E4M3)
    scaling.load_state({"point1": [0.0, 8.0], "another": [0.0, 1.0]})
    assert scaling.points[0].spec() is None
    spec = scaling.points[1].spec()
    assert spec is not None
    assert float(spec.scale) == 448 / 8


def test_state_holds_points_with_a_history_alone():
    scaling = scaling_with(E4M3, E4M3, E4M3, history_steps=2)
    scaling.points[0].quantize(torch.ones(1, 1))
    scaling.points[1].quantize(torch.zeros(1, 1))
    scaling.end_step(None)
    assert scaling.state() == {"point0": [0, 1, 0]}


# ------------------------------------------------------------------------------------------ ranks


def agreeing_rank(rank: int, world_size: int) -> list[list[float]]:
    """Two steps of points that every rank sees another part of."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group = dist.group.WORLD
    scaling = scaling_with(E4M3, E5M2, E5M2, E4M3)
    everywhere = torch.tensor([[float(rank + 1)]])
    at_one = torch.tensor([[math.inf if rank == 0 else 6.0]])
    nan_at_one = torch.tensor([[3.0 if rank == 0 else math.nan]])
    zero_at_one = torch.tensor([[0.0 if rank == 0 else 1e-5]])
    history = []
    for _ in range(2):
        step(scaling, everywhere, at_one, nan_at_one, zero_at_one, group=group)
        history.append(scaling.scale_p.tolist())
        assert all(point.has_history for point in scaling.points)
    return history


def test_all_ranks_have_the_scale_of_the_largest_number():
    """Neither an infinity nor a NaN of one rank hides what the others saw."""
    found = run_distributed(agreeing_rank, 2)
    assert found[0] == found[1]
    for scale_p in found[0]:
        assert scale_p == pytest.approx([448 / 2, 57344 / 6, 57344 / 3, 448 / 1e-5])
