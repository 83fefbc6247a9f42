"""The FP8 guard: what it finds, what it does about it, and that looking changes nothing.

On a CPU, so on the torch references of the kernels; FP8's roundings are the same.  The layer that
FP8 cannot compute is made so by one weight of 10^4 in FC1, whose unit is dead otherwise: its gate's
row and its column of FC2 are zero, so that neither the output nor any gradient knows of it, and
BF16 computes as before.  A scale of 448 / 10^4 makes zeros of the other weights, which are 0.02 at
standard deviation: E4M3 rounds to zero what is below 2^-10.
"""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from tests.support.runs import write_config, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

FP8 = ["model.backend=triton", "precision.mode=fp8"]
SICK_LAYER = 3
OUTLIER = 1e4


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fp8_guard")
    shard = write_shard(folder / "tokens")
    return write_config(folder, shard)


@torch.no_grad()
def make_sick(run, number):
    """One outlier in FC1's up half, in the first unit of the first tensor-parallel rank."""
    from litespark.checkpoint.sharded import bare_model

    for chunk in run.chunks:
        for layer in bare_model(chunk).decoder.layers:
            if layer.layer_number != number:
                continue
            fc1_nh, fc2_hf = layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight
            is_first = run.layout.coordinates(run.process.rank).tensor == 0
            if is_first:
                fc1_nh[0] = 0.0  # the gate: silu(0) = 0
                fc1_nh[fc1_nh.size(0) // 2, 0] = OUTLIER
                fc2_hf[:, 0] = 0.0
    run.optimizer.reload_model_params()


def guarded_rank(rank, world_size, config_path, overrides, sick_layer, stop_step=None):
    """Train with all hooks; what a test looks at afterwards."""
    from litespark.config import load_config
    from litespark.fp8.linear import HighPrecision
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.loop import Hook, train
    from litespark.training.run import build_hooks
    from litespark.training.setup import set_up
    from litespark.training.step import mean_loss, train_step

    run = set_up(load_config(config_path, overrides))
    if sick_layer is not None and run.step == 0:
        make_sick(run, sick_layer)
    history = []

    class Recorder(Hook):
        def after_step(self, run, outcome):
            history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))

    hooks = [Recorder(), *build_hooks(run)]
    if stop_step is None:
        train(run, hooks)
    else:  # as a run that is ended after the checkpoint
        for hook in hooks:
            hook.on_start(run)
        for hook in hooks:
            hook.on_state(run)
        while run.step < stop_step:
            outcome = train_step(run)
            for hook in hooks:
                hook.after_step(run, outcome)
        Checkpointing().save_now(run)
        for hook in hooks:
            hook.close()
    run.close()
    from litespark.checkpoint.sharded import bare_model

    in_bf16 = [
        layer.layer_number
        for chunk in run.chunks
        for layer in bare_model(chunk).decoder.layers
        if isinstance(layer.mlp.formats.fc1, HighPrecision)
    ]
    return {"history": history, "in_bf16": in_bf16, "moved": sorted(run.policy.moved_layers)}


def compared_rank(rank, world_size, config_path, overrides, sick_layer, ruin=None):
    """One comparison of initial weights: the gap, and the detail that is logged."""
    from litespark.config import load_config
    from litespark.training.hooks.fp8_guard import Fp8Guard
    from litespark.training.setup import set_up

    run = set_up(load_config(config_path, overrides))
    if sick_layer is not None:
        make_sick(run, sick_layer)
    if ruin is not None:
        _return_nan(ruin)
    details = []
    run.record_event = lambda event, detail: details.append((event, detail))
    gap = Fp8Guard().compare(run)
    run.close()
    return gap, details


def _return_nan(point_name):
    """The input of one linear is NaN once it is quantised."""
    from litespark.fp8.scaling import Point

    original = Point.spec_for

    def spec_for(self, values, amax=None):
        spec = original(self, values, amax)
        if self.name == point_name:
            spec.scale_inv.fill_(math.nan)
        return spec

    Point.spec_for = spec_for


def events(folder, kind="fp8_guard"):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def worst_layer(detail):
    return int(detail.partition(" in layer ")[2].partition(";")[0])


def largest_error(detail):
    return float(detail.partition("largest error ")[2].partition(" ")[0])


# ------------------------------------------------------------------------- looking changes nothing


@pytest.mark.parametrize(
    ("recipe", "world_size", "layout"),
    [
        ("delayed", 1, []),
        ("tensorwise", 1, []),
        ("delayed", 2, ["parallel.tensor=2", "parallel.sequence=true"]),
    ],
    ids=["delayed", "tensorwise", "delayed, TP2+SP"],
)
def test_training_depends_on_neither_guard_nor_evaluation(
    recipe, world_size, layout, config_path, tmp_path
):
    """Bit for bit.  A delayed scale that saw the validation batches would be another one."""
    found = {}
    for name, extra in {
        "alone": [],
        "guarded": ["precision.guard_every=1"],
        "evaluated": ["training.eval_every=2", "training.eval_steps=2"],
    }.items():
        options = [*FP8, f"precision.recipe={recipe}", *layout, f"run.output_dir={tmp_path / name}"]
        options.append("training.steps=6")
        result = run_distributed(guarded_rank, world_size, config_path, [*options, *extra], None)
        found[name] = result[0]["history"]
    assert len(found["alone"]) == 6
    assert found["guarded"] == found["alone"]
    assert found["evaluated"] == found["alone"]
    assert len(events(tmp_path / "guarded")) == 6


def test_what_is_resumed_does_not_know_of_evaluations(config_path, tmp_path):
    """A checkpoint written right after an evaluation holds the scales of training alone."""
    states = {}
    for name, extra in {"alone": [], "evaluated": ["training.eval_every=5"]}.items():
        options = [*FP8, f"run.output_dir={tmp_path / name}", *extra]
        run_distributed(guarded_rank, 1, config_path, options, None, 5)
        (checkpoint,) = (tmp_path / name / "checkpoints").glob("step_*")
        states[name] = json.loads((checkpoint / "run_state.json").read_text())["fp8_scales"]
    assert states["alone"]
    assert states["evaluated"] == states["alone"]


# ------------------------------------------------------------------------------- what it finds


def test_the_gap_is_an_event(config_path, tmp_path):
    options = [*FP8, "precision.guard_every=5", f"run.output_dir={tmp_path / 'run'}"]
    run_distributed(guarded_rank, 1, config_path, options, None)
    first, second = events(tmp_path / "run")
    assert (first["step"], second["step"]) == (5, 10)
    for event in (first, second):
        gap = float(event["detail"].split()[1])
        # As of the losses, see test_fused_layouts; 0 would mean that one thing was compared.
        assert 0 < gap < 0.01
        assert "limit 1.00e-02" in event["detail"]
        assert "continues in BF16" not in event["detail"]
        assert 0 < largest_error(event["detail"]) < 0.2


@pytest.mark.parametrize("sick_layer", [1, 3, 4])
def test_the_layer_that_fp8_cannot_compute_is_found(sick_layer, config_path):
    """Without its MLP a layer of initial weights is about half of what it should be."""
    _, healthy = run_distributed(compared_rank, 1, config_path, FP8, None)[0]
    _, sick = run_distributed(compared_rank, 1, config_path, FP8, sick_layer)[0]
    ((_, detail),), ((_, healthy_detail),) = sick, healthy
    assert worst_layer(detail) == sick_layer
    assert largest_error(detail) > 3 * largest_error(healthy_detail)


@pytest.mark.parametrize(
    "layout",
    [
        "parallel.pipeline=2",
        "parallel.tensor=2",
        "parallel.tensor=2 parallel.sequence=true",
        "parallel.pipeline=2 parallel.virtual_pipeline=2",
    ],
)
def test_every_layout_finds_the_same_layer(layout, config_path):
    """Where tokens are split the largest of the parts' errors is told, which is more than all's."""
    (gap, ((_, expected),)) = run_distributed(compared_rank, 1, config_path, FP8, SICK_LAYER)[0]
    found = run_distributed(compared_rank, 2, config_path, [*FP8, *layout.split()], SICK_LAYER)
    assert found[0] == found[1], "ranks disagree"
    found_gap, ((_, detail),) = found[0]
    assert worst_layer(detail) == SICK_LAYER
    if "tensor" not in layout:
        assert found_gap == pytest.approx(gap, rel=1e-3)
        assert largest_error(detail) == largest_error(expected)
    elif "sequence" not in layout:  # the other half of FC1 has a scale of its own, no outlier
        assert largest_error(detail) < largest_error(expected)


@pytest.mark.parametrize("layer", [1, 2])
def test_nan_is_the_worst_error(layer, config_path):
    """Also where other ranks and layers have numbers: NaN compares with none of them."""
    name = f"layers.{layer - 1}.linear_fc2.input"
    found = run_distributed(
        compared_rank, 2, config_path, [*FP8, "parallel.pipeline=2"], None, name
    )
    gap, ((_, detail),) = found[0]
    assert math.isnan(gap)
    assert worst_layer(detail) == layer
    assert "largest error inf" in detail


# ------------------------------------------------------------------------------- what it does


def moving(folder):
    """Small enough a gap that the sick layer is beyond it, and the healthy ones are not."""
    return [
        *FP8,
        f"run.output_dir={folder}",
        "precision.guard_every=3",
        "precision.guard_action=bf16",
        "precision.guard_max_gap=1e-9",
    ]


@pytest.mark.parametrize("layout", [[], ["parallel.pipeline=2"]], ids=["one process", "PP2"])
def test_a_moved_layer_stays_in_bf16_also_after_a_resume(layout, config_path, tmp_path):
    """One layer a comparison, at steps 3, 6 and 9; the run is cut at step 7."""
    world_size = 2 if layout else 1
    whole = run_distributed(
        guarded_rank, world_size, config_path, [*moving(tmp_path / "whole"), *layout], SICK_LAYER
    )
    cut = [*moving(tmp_path / "cut"), *layout]
    first = run_distributed(guarded_rank, world_size, config_path, cut, SICK_LAYER, 7)
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").glob("step_*")
    saved = json.loads((checkpoint / "run_state.json").read_text())["bf16_layers"]
    second = run_distributed(guarded_rank, world_size, config_path, cut, SICK_LAYER)

    assert SICK_LAYER in saved
    assert len(saved) == 2
    assert all(result["moved"] == saved for result in first)
    assert sorted(n for result in first for n in result["in_bf16"]) == saved
    assert first[0]["history"] + second[0]["history"] == whole[0]["history"]
    assert second[0]["moved"] == whole[0]["moved"]
    assert sorted(n for result in second for n in result["in_bf16"]) == whole[0]["moved"]
    moved = [worst_layer(event["detail"]) for event in events(tmp_path / "whole")]
    assert moved[0] == SICK_LAYER
    assert sorted(moved) == whole[0]["moved"], "no layer is moved twice"


def test_log_moves_nothing(config_path, tmp_path):
    options = [*moving(tmp_path / "run"), "precision.guard_action=log"]
    result = run_distributed(guarded_rank, 1, config_path, options, SICK_LAYER)[0]
    assert result["moved"] == result["in_bf16"] == []


def test_when_all_layers_are_moved_nothing_is_left_to_compare(config_path, tmp_path):
    options = [*moving(tmp_path / "run"), "precision.guard_every=2"]
    result = run_distributed(guarded_rank, 1, config_path, options, None)[0]
    assert result["moved"] == [1, 2, 3, 4]
    last = events(tmp_path / "run")[-1]
    assert last["detail"].startswith("gap 0.00e+00"), "the same layers twice"
    assert "layer" not in last["detail"]


def announced_rank(rank, world_size, config_path, overrides):
    """What a comparison beyond the limit says, and at which level."""
    from litespark.config import load_config
    from litespark.training.hooks.fp8_guard import Fp8Guard
    from litespark.training.setup import set_up

    run = set_up(load_config(config_path, overrides))
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logging.getLogger("litespark.fp8").addHandler(handler)
    logging.getLogger("litespark.fp8").setLevel(logging.INFO)
    Fp8Guard().compare(run)
    run.close()
    return records


@pytest.mark.parametrize(("limit", "level"), [("1e-9", "WARNING"), ("0.5", "INFO")])
def test_one_rank_says_it(limit, level, config_path, tmp_path):
    options = [*FP8, f"precision.guard_max_gap={limit}", f"run.output_dir={tmp_path / 'run'}"]
    first, other = run_distributed(announced_rank, 2, config_path, options)
    ((found, message),) = first
    assert found == level
    assert message.startswith("step 0: FP8 against BF16: gap ")
    assert other == []
