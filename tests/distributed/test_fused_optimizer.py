"""Training with `FusedAdamW`, through its reference, against megatron-core's own step.

Both do the same arithmetic in fp32 in the same order, but for the norm, which is summed in fp32
upstream and in fp64 here.  So the clipping factor and every gradient differ by 2^-24 or so.  Adam
divides a gradient by its own size: of that, 2^-24 of a step stays, far below 1e-6 of the loss or
of a weight in ten steps.  In bf16 a master that moves by so little is now and then rounded to
another bf16 number, 2^-8 away.  There, megatron-core's step is given the norm in fp64 too, and then
nothing may differ in a single bit.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.runs import write_config, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

CLIPPED = ["optimizer.clip_grad=0.1"]
BF16 = ["precision.mode=bf16"]
REPLICATED = ["parallel.distributed_optimizer=false"]
EXACT = "stock, norm in fp64"
TIED = ["model.tie_embeddings=true"]

LAYOUTS = {
    "single": (1, []),
    "single, replicated": (1, REPLICATED),
    "DP2": (2, []),
    "DP2 replicated": (2, REPLICATED),
    "DP2 overlapped": (
        2,
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "TP2 replicated": (2, ["parallel.tensor=2", *REPLICATED]),
    "PP2 tied": (2, ["parallel.pipeline=2", *TIED]),
    "PP2 tied replicated": (2, ["parallel.pipeline=2", *TIED, *REPLICATED]),
    "PP2 interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fused")
    shard = write_shard(folder / "tokens")
    return write_config(folder, shard)


def _norm_in_fp64(grads: list[torch.Tensor], norm_type: int = 2, *, grad_stats_parallel_group: Any):
    """Stands for `get_grad_norm_fp32`."""
    assert norm_type == 2
    total = torch.zeros(1, dtype=torch.float64)
    for grad in grads:
        total += grad.double().square().sum()
    dist.all_reduce(total, group=grad_stats_parallel_group)
    return total.item() ** 0.5


def _set_up(config_path: str, overrides: list[str], adam: str) -> Any:
    """A run with the stock optimizer, the fused one, or that one as beside Transformer Engine."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    from litespark.config import load_config
    from litespark.training import setup
    from litespark.training.optimizer import FusedOptimizer, build_optimizer

    if adam == "fused beside TE":
        # What megatron-core sets where it finds Transformer Engine: steps are counted in groups.
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_TE_OPTIMIZER = True
    if adam == "stock, norm in fp64":
        optimizer.get_grad_norm_fp32 = _norm_in_fp64
    is_fused = adam.startswith("fused")
    setup.build_optimizer = functools.partial(build_optimizer, fused=is_fused)
    run = setup.set_up(load_config(config_path, overrides))
    assert isinstance(run.optimizer, FusedOptimizer) == is_fused
    return run


def train_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], adam: str, *steps: int
) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
    """Train to the end, or to step `steps[0]` and save; losses, norms, and this rank's weights."""
    from litespark.checkpoint.sharded import bare_model
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.step import mean_loss, parameters_synchronised, train_step

    run = _set_up(config_path, overrides, adam)
    history = []
    while run.step < (steps[0] if steps else run.total_steps):
        outcome = train_step(run)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
    if steps:
        Checkpointing().save_now(run)
    with parameters_synchronised(run.chunks):
        weights = {
            f"{number}.{name}": parameter.detach().float().numpy().copy()
            for number, chunk in enumerate(run.chunks)
            for name, parameter in bare_model(chunk).named_parameters()
        }
    run.close()
    return history, weights


def train(config_path: str, layout: str, overrides: list[str], *arguments: Any) -> list[Any]:
    world_size, of_layout = LAYOUTS[layout]
    return run_distributed(
        train_rank, world_size, config_path, [*of_layout, *overrides], *arguments
    )


@functools.cache
def stock_in_fp64(config_path: str, layout: str, *overrides: str) -> list[Any]:
    """Ten steps of megatron-core's own optimizer, trained once for all tests that ask for them."""
    return train(config_path, layout, list(overrides), EXACT)


@functools.cache
def stock_to_step_3(config_path: str, layout: str, *overrides: str) -> tuple[Path, Any]:
    """The folder of a run that was saved after three such steps, and its history."""
    folder = Path(tempfile.mkdtemp(dir=Path(config_path).parent))
    target = [*overrides, f"run.output_dir={folder}"]
    return folder, train(config_path, layout, target, EXACT, 3)[0][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_steps_equal_stock_steps(layout, config_path):
    for (expected, expected_weights), (found, weights) in zip(
        train(config_path, layout, CLIPPED, "stock"),
        train(config_path, layout, CLIPPED, "fused"),
        strict=True,
    ):
        assert len(found) == 10
        for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
            assert wanted_norm > 0.1, "nothing was clipped"
            assert loss == pytest.approx(wanted_loss, rel=1e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-6)
        for name, wanted in expected_weights.items():
            np.testing.assert_allclose(weights[name], wanted, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "layout", ["DP2", "DP2 replicated", "DP2 overlapped", "TP2 replicated", "PP2 tied"]
)
def test_bf16_weights_are_those_of_the_stock_step(layout, config_path):
    options = [*BF16, *CLIPPED]
    for (expected, expected_weights), (found, weights) in zip(
        stock_in_fp64(config_path, layout, *options),
        train(config_path, layout, options, "fused"),
        strict=True,
    ):
        assert min(norm for _, norm in expected) > 0.1, "nothing was clipped"
        assert_bits_equal(found, weights, expected, expected_weights)


@pytest.mark.parametrize("adam", ["fused", "fused beside TE"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["DP2", "DP2 replicated"])
def test_checkpoints_go_from_one_adam_to_another(layout, precision, adam, config_path, tmp_path):
    """Stock to step 3, fused to step 6, stock to step 10: as ten steps of the stock optimizer."""
    options = [f"precision.mode={precision}", *CLIPPED]
    target = [*options, f"run.output_dir={tmp_path / 'run'}"]
    expected, expected_weights = stock_in_fp64(config_path, layout, *options)[0]
    folder, first = stock_to_step_3(config_path, layout, *options)
    shutil.copytree(folder, tmp_path / "run")
    history = first + train(config_path, layout, target, adam, 6)[0][0]
    last, weights = train(config_path, layout, target, EXACT)[0]
    assert len(last) == 4
    assert_bits_equal(history + last, weights, expected, expected_weights)


def assert_bits_equal(found, weights, expected, expected_weights):
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]
    assert weights.keys() == expected_weights.keys()
    for name, wanted in expected_weights.items():
        np.testing.assert_array_equal(weights[name], wanted, err_msg=name)


def _parameters_with_gradients(number):
    generator = torch.Generator().manual_seed(number)
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (5,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def _fused(parameters):
    from litespark.training.optimizer import FusedAdamW

    return FusedAdamW(torch.optim.AdamW(parameters, lr=0.1).param_groups, {})


def test_steps_are_counted_on_from_where_a_checkpoint_says():
    """Torch counts in each parameter's state, the fused Adam in the group."""
    from types import SimpleNamespace

    from litespark.checkpoint.optimizer_state import optimizer_step, set_optimizer_step

    theirs, own = _parameters_with_gradients(0), _parameters_with_gradients(0)
    torchs = torch.optim.AdamW(theirs, lr=0.1)
    for _ in range(3):
        torchs.step()
    fused = _fused(own)
    fused.step()  # another count, and other moments, which are taken over below
    with torch.no_grad():
        for mine, their in zip(own, theirs, strict=True):
            mine.copy_(their)
            for moment in ("exp_avg", "exp_avg_sq"):
                fused.state[mine][moment].copy_(torchs.state[their][moment])
    written, read = SimpleNamespace(optimizer=torchs), SimpleNamespace(optimizer=fused)
    set_optimizer_step(read, optimizer_step(written))
    assert optimizer_step(read) == 3
    for _ in range(2):
        fused.step()
        torchs.step()
    assert all(map(torch.equal, own, theirs))
    set_optimizer_step(written, optimizer_step(read) + 4)
    assert optimizer_step(written) == 9
    assert [state["step"].item() for state in torchs.state.values()] == [9, 9]


def test_parameters_without_a_gradient_stay():
    parameters = _parameters_with_gradients(0)
    parameters[1].grad = None
    _fused(parameters).step()
    assert (parameters[0] != 1).all()
    assert (parameters[1] == 1).all()


@pytest.mark.parametrize(
    ("norm", "factor"),
    [(0.0, 1.0), (0.5, 1.0), (4.0, 0.25), (float("inf"), 0.0), (float("nan"), 1.0)],
)
def test_clipping_factor(norm, factor):
    from litespark.training.optimizer import _clipping_factor

    found = _clipping_factor(torch.tensor([norm], dtype=torch.float64), 1.0)
    assert found is not None
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(factor, abs=1e-6)


def test_no_clipping():
    from litespark.training.optimizer import _clipping_factor

    assert _clipping_factor(torch.ones(1), 0.0) is None


def refusing_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], adam: str
) -> bool:
    """Whether the step that a judge refused left all of the optimizer as it was, bit for bit."""
    from litespark.checkpoint.sharded import bare_model
    from litespark.training.step import train_step

    run = _set_up(config_path, overrides, adam)
    seen: list[float] = []

    def state() -> list[torch.Tensor]:
        moments = [
            value
            for each in run.optimizer.chained_optimizers
            for moment in each.optimizer.state.values()
            for value in moment.values()
            if torch.is_tensor(value)
        ]
        weights = [weight for chunk in run.chunks for weight in bare_model(chunk).parameters()]
        counts = [torch.tensor(group.get("step", 0)) for group in run.optimizer.param_groups]
        return [tensor.detach().clone() for tensor in (*moments, *weights, *counts)]

    def judge(norm: float, losses: torch.Tensor, batches: Any) -> str | None:
        seen.append(norm)
        return "for the test" if run.step == 1 else None

    run.judges.append(judge)
    outcomes, states = [], []
    for _ in range(3):
        outcomes.append(train_step(run))
        states.append(state())
    run.close()
    assert [outcome.refused for outcome in outcomes] == [None, "for the test", None]
    assert seen == [outcome.grad_norm for outcome in outcomes]
    assert not all(map(torch.equal, states[1], states[2])), "the next step is made"
    return all(map(torch.equal, states[0], states[1]))


@pytest.mark.parametrize("adam", ["stock", "fused"])
@pytest.mark.parametrize("layout", ["single, replicated", "DP2", "TP2+SP", "PP2 interleaved"])
def test_a_refused_step_changes_nothing(layout, adam, config_path):
    world_size, overrides = LAYOUTS[layout]
    found = run_distributed(refusing_rank, world_size, config_path, [*overrides, *BF16], adam)
    assert found == [True] * world_size
