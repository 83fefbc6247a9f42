"""Weights that exist in FP8 alone: training, layouts, checkpoints, and what a refused step leaves.

On a CPU, so on the torch references of the kernels; FP8's roundings are the same.  In every run the
stored weights are compared with the masters after each step, to the last bit (`check_weights`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.support.runs import config_tree, train_alone, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

COPIES = ["model.backend=triton", "precision.mode=fp8"]
FP8 = [*COPIES, "precision.primary_weights=fp8"]
OVERLAPPED = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
REPLICATED = ["parallel.distributed_optimizer=false"]

LAYOUTS = {
    "single, replicated": (1, REPLICATED),
    "DP2 overlapped": (2, OVERLAPPED),
    "DP2 replicated": (2, REPLICATED),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2 interleaved x DP2 overlapped": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", *OVERLAPPED],
    ),
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fp8_primary")
    tree = config_tree(folder, write_shard(folder / "tokens"))
    tree["training"]["steps"] = 6
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def fp8_parts(run: Any) -> list[tuple[torch.Tensor, torch.Tensor, int, int]]:
    from litespark.checkpoint.optimizer_state import owned_masters
    from litespark.fp8.primary import primary_spec

    return [
        part
        for optimizer in run.optimizer.chained_optimizers
        for part in owned_masters(optimizer)
        if primary_spec(part[0]) is not None
    ]


@torch.no_grad()
def check_weights(run: Any) -> None:
    """Each stored weight is E4M3, all of its layer's linears are there, and the master rounded."""
    from litespark.checkpoint.sharded import bare_model
    from litespark.fp8.primary import primary_spec
    from litespark.ops.formats import E4M3
    from litespark.parallel.groups import gather_objects
    from litespark.training.step import parameters_synchronised

    policy = run.policy
    in_fp8 = 0
    for chunk in run.chunks:
        for layer in bare_model(chunk).decoder.layers:
            linears = [parameter for parameter in layer.parameters() if parameter.dim() == 2]
            assert len(linears) == 4
            wanted = E4M3 if policy.uses_fp8(layer.layer_number) else torch.bfloat16
            assert {parameter.dtype for parameter in linears} == {wanted}
            in_fp8 += 4 * (wanted == E4M3)
    assert len(policy.primary.names) == len(set(policy.primary.names)) == in_fp8
    assert not policy.primary.pending
    with parameters_synchronised(run.chunks):
        for parameter, master, start, stop in fp8_parts(run):
            scale = primary_spec(parameter).scale
            expected = (master.view(-1) * scale).clamp(-448, 448).to(E4M3)
            stored = parameter.view(-1)[start:stop]
            assert torch.equal(stored.view(torch.uint8), expected.view(torch.uint8))
            assert 32 <= stored.float().abs().max() <= 448, "uses the format's range"
    scales = {}
    for part in gather_objects(policy.primary.state()):
        for name, values in part.items():
            assert scales.setdefault(name, values) == values, "ranks disagree"


def checked_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], stop_step: int | None = None
) -> list[tuple[float, float]]:
    """Train to the end, or to a step and save; the losses and norms."""
    from litespark.config import load_config
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.setup import set_up
    from litespark.training.step import mean_loss, train_step

    run = set_up(load_config(config_path, overrides))
    check_weights(run)
    history = []
    while run.step < (stop_step or run.total_steps):
        outcome = train_step(run)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
        check_weights(run)
    if stop_step is not None:
        Checkpointing().save_now(run)
    run.train_batches and run.train_batches.close()
    return history


@pytest.fixture(scope="module")
def single(config_path) -> list[tuple[float, float]]:
    return run_distributed(checked_rank, 1, config_path, FP8)[0]


def assert_close(found, expected, relative):
    assert len(found) == len(expected)
    for (loss, norm), (wanted, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=relative)
        assert norm == pytest.approx(wanted_norm, rel=0.1)


def test_learns_as_with_bf16_weights(config_path, single):
    """The bound of `test_fused_layouts.py`: E4M3's rounding is the same, only its scale another."""
    bf16 = train_alone(config_path, "precision.mode=bf16")
    copies = train_alone(config_path, *COPIES)
    assert single not in (bf16, copies)
    assert_close(single, bf16, 2e-3)
    assert_close(single, copies, 2e-3)
    assert single[-1][0] < 0.99 * single[0][0], "does not learn"


def test_current_scales_of_activations(config_path, single):
    found = run_distributed(checked_rank, 1, config_path, [*FP8, "precision.recipe=tensorwise"])[0]
    assert found != single
    assert_close(found, single, 2e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout, config_path, single):
    """All ranks of a weight share its scale, so that layouts differ in the order of sums alone.

    That is 2^-9 of a BF16 sum under tensor parallelism, and nothing a master of 2^-24 would show
    otherwise.
    """
    world_size, overrides = LAYOUTS[layout]
    found = run_distributed(checked_rank, world_size, config_path, [*FP8, *overrides])
    assert all(history == found[0] for history in found)
    assert_close(found[0], single, 2**-9 if "TP" in layout else 1e-5)


def test_layers_kept_in_bf16(config_path, single):
    """On two stages, of which the first has no weight in FP8."""
    options = [*FP8, "precision.bf16_first_layers=2", "parallel.pipeline=2"]
    found = run_distributed(checked_rank, 2, config_path, options)[0]
    assert_close(found, single, 2e-3)


@pytest.mark.parametrize("layout", ["DP2 overlapped", "TP2+SP"])
def test_resumes_bit_for_bit(layout, config_path, tmp_path):
    """With a learning rate at which scales change between steps."""
    world_size, overrides = LAYOUTS[layout]
    options = [*FP8, *overrides, "optimizer.lr=0.02"]
    expected = run_distributed(checked_rank, world_size, config_path, options)[0]
    target = [*options, f"run.output_dir={tmp_path / 'run'}"]
    first = run_distributed(checked_rank, world_size, config_path, target, 3)[0]
    rest = run_distributed(checked_rank, world_size, config_path, target)[0]
    assert [*first, *rest] == expected


def loaded_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], alone: str | None
) -> dict[str, np.ndarray]:
    """Resume; the masters of this rank, which is the only one.

    `alone` is a checkpoint of which the weights are then loaded, and nothing else.
    """
    from pathlib import Path

    from litespark.checkpoint.load import load_weights
    from litespark.checkpoint.optimizer_state import owned_masters
    from litespark.checkpoint.sharded import bare_model
    from litespark.config import load_config
    from litespark.training.setup import set_up

    run = set_up(load_config(config_path, overrides))
    if alone is not None:
        load_weights(Path(alone), run.chunks)
        run.optimizer.reload_model_params()
    if run.policy.primary is not None:
        check_weights(run)
    run.train_batches and run.train_batches.close()
    names = {parameter: name for name, parameter in bare_model(run.chunks[0]).named_parameters()}
    return {
        names[parameter]: master.detach().view(-1).numpy().copy()
        for optimizer in run.optimizer.chained_optimizers
        for parameter, master, _, _ in owned_masters(optimizer)
    }


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


def assert_equal(found, expected, change=lambda values: values):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], change(values), err_msg=name)


def test_checkpoints_go_to_and_from_other_precisions_and_layouts(config_path, tmp_path):
    """Masters arrive whole; the model's own weights are stored as the masters rounded to BF16."""
    target = [f"run.output_dir={tmp_path / 'run'}"]
    run_distributed(checked_rank, 2, config_path, [*FP8, *target], 2)
    checkpoint = str(tmp_path / "run/checkpoints/step_000000002")
    load = functools.partial(run_distributed, loaded_rank, 1, config_path)
    masters = load([*target, "precision.mode=fp32"], None)[0]
    assert any((rounded_to_bf16(values) != values).any() for values in masters.values())
    assert_equal(load([*target, "precision.mode=bf16"], None)[0], masters)
    assert_equal(load([*FP8, *target], None)[0], masters)
    assert_equal(load([*FP8, *target], checkpoint)[0], masters, rounded_to_bf16)
    assert_equal(load([*target, "precision.mode=bf16"], checkpoint)[0], masters, rounded_to_bf16)


@pytest.mark.parametrize("written_in", ["fp32", "bf16"])
def test_goes_on_from_another_precision(written_in, config_path, single, tmp_path):
    from tests.support.runs import train_and_save_rank

    target = [f"run.output_dir={tmp_path / 'run'}"]
    options = [*target, f"precision.mode={written_in}", "parallel.tensor=2"]
    run_distributed(train_and_save_rank, 2, config_path, options, 3)
    load = functools.partial(run_distributed, loaded_rank, 1, config_path)
    masters = load([*target, "precision.mode=fp32"], None)[0]
    for precision in (["precision.mode=bf16"], FP8):
        assert_equal(load([*target, *precision], None)[0], masters)
    found = run_distributed(checked_rank, 2, config_path, [*FP8, *target])[0]
    assert_close(found, single[3:], 2e-3)


def refusing_rank(rank: int, world_size: int, config_path: str, overrides: list[str]) -> bool:
    """Whether a refused step left weights and scales as they were, bit for bit."""
    from litespark.config import load_config
    from litespark.training.setup import set_up
    from litespark.training.step import train_step

    run = set_up(load_config(config_path, overrides))
    run.judges.append(lambda *_: "for the test" if run.step == 1 else None)
    states = []
    for _ in range(3):
        train_step(run)
        check_weights(run)
        weights = [part[0].detach().view(torch.uint8).clone() for part in fp8_parts(run)]
        states.append([*weights, run.policy.primary.scale_w.clone()])
    run.train_batches and run.train_batches.close()
    assert not all(map(torch.equal, states[1], states[2])), "the next step is made"
    return all(map(torch.equal, states[0], states[1]))


def test_a_refused_step_changes_nothing(config_path):
    options = [*FP8, "optimizer.lr=0.02"]
    assert run_distributed(refusing_rank, 2, config_path, options) == [True, True]


def guarded_rank(rank: int, world_size: int, config_path: str, overrides: list[str]) -> list[float]:
    """The guard's gap, and the losses after it has moved a layer."""
    from litespark.config import load_config
    from litespark.training.hooks.fp8_guard import Fp8Guard
    from litespark.training.setup import set_up
    from litespark.training.step import mean_loss, train_step

    run = set_up(load_config(config_path, overrides))
    found = [Fp8Guard().compare(run)]
    assert len(run.policy.moved_layers) == 1
    while run.step < run.total_steps:
        found.append(mean_loss(train_step(run).loss_and_tokens))
        check_weights(run)
    run.train_batches and run.train_batches.close()
    return found


def test_the_guard_compares_and_moves(config_path, single):
    """Its BF16 has the same weights; a moved layer learns on."""
    options = [*FP8, "precision.guard_max_gap=1e-9", "precision.guard_action=bf16"]
    gap, *losses = run_distributed(guarded_rank, 1, config_path, options)[0]
    assert 0 < gap < 2e-3
    assert losses != [loss for loss, _ in single]
    assert losses == pytest.approx([loss for loss, _ in single], rel=2e-3)
