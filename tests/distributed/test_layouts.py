"""Parallelism changes nothing but speed: every layout against the single process.

Same seed, so the same weights and samples.  The bound: a sum of n fp32 numbers in another order
differs by about sqrt(n) 2^-24, and Adam divides gradients by their own size, so a tiny gradient's
rounding moves its weight by a visible part of the learning rate.  At lr 1e-3 ten such steps moved
the loss by at most 8e-8 of itself in the worst layout; 1e-5 leaves room for other CPUs' kernels and
is far below what a real fault causes (a forgotten reduction: 1e-3).
"""

from __future__ import annotations

import pytest

from tests.support.runs import (
    optimizer_groups_rank,
    train_alone,
    train_and_save_rank,
    train_rank,
    train_unreduced_norms_rank,
    write_config,
    write_shard,
)
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

RELATIVE_BOUND = 1e-5

LAYOUTS = {
    "TP2": (2, "parallel.tensor=2"),
    "TP2+SP": (2, "parallel.tensor=2 parallel.sequence=true"),
    "TP4": (4, "parallel.tensor=4"),
    "PP2": (2, "parallel.pipeline=2"),
    "PP2 interleaved": (2, "parallel.pipeline=2 parallel.virtual_pipeline=2"),
    "PP4": (4, "parallel.pipeline=4"),
    "TP2xPP2+SP": (4, "parallel.tensor=2 parallel.pipeline=2 parallel.sequence=true"),
    "DP2": (2, "parallel.distributed_optimizer=false"),
    "DP2 distributed optimizer": (2, ""),
    "DP2 overlapped": (
        2,
        "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true",
    ),
    "TP2xDP2": (4, "parallel.tensor=2"),
    "CP2": (2, "parallel.context=2"),
    "TP2xCP2+SP": (4, "parallel.tensor=2 parallel.context=2 parallel.sequence=true"),
    "PP2xDP2": (4, "parallel.pipeline=2"),
    "CP2xPP2 interleaved": (
        4,
        "parallel.context=2 parallel.pipeline=2 parallel.virtual_pipeline=2",
    ),
    "TP2+SP full recompute": (
        2,
        "parallel.tensor=2 parallel.sequence=true training.recompute=full",
    ),
    "PP2 selective recompute": (2, "parallel.pipeline=2 training.recompute=selective"),
}
TIED_AND_PADDED = "model.tie_embeddings=true model.vocab_size=121 model.vocab_padding_multiple=4"


def options_of(name: str) -> tuple[int, list[str]]:
    """The number of processes and the options of a layout, or of one process.

    The many small collectives of TP and CP take the time: there, two micro-batches a step instead
    of four, which are still accumulated, and still wait for one another in a pipeline.
    """
    world_size, overrides = LAYOUTS.get(name, (1, ""))
    is_slow = name.startswith(("TP", "CP")) and "DP" not in name
    return world_size, [*overrides.split(), *(["batch.micro=4"] if is_slow else [])]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("layouts")
    shard = write_shard(folder / "tokens")
    return write_config(folder, shard)


@pytest.fixture(scope="module")
def single_process(config_path):
    return train_alone(config_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name, config_path, single_process):
    world_size, options = options_of(name)
    histories = run_distributed(train_rank, world_size, config_path, options)
    assert all(history == histories[0] for history in histories), "ranks disagree on the loss"
    assert_same(histories[0], single_process)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_tied_embeddings_and_padded_vocabulary(layout, config_path):
    options = TIED_AND_PADDED.split()
    expected = train_alone(config_path, *options)
    found = run_distributed(train_rank, 2, config_path, [*options, layout])[0]
    assert_same(found, expected)
    # And padding changes nothing: the same model without it has the same loss.
    unpadded = [*options, "model.vocab_padding_multiple=1"]
    assert_same(train_alone(config_path, *unpadded), expected)


def test_resume_at_another_layout(config_path, single_process, tmp_path):
    """Saved at TP2xPP2+SP after 5 steps; 5 more at other layouts end as 10 in one process do."""
    target = [f"run.output_dir={tmp_path / 'run'}"]
    saved_at = LAYOUTS["TP2xPP2+SP"][1].split()
    run_distributed(train_and_save_rank, 4, config_path, [*saved_at, *target], 5)
    for name in ("PP2xDP2", "TP2", "PP2 interleaved"):
        world_size, overrides = LAYOUTS[name]
        histories = run_distributed(
            train_rank, world_size, config_path, [*overrides.split(), *target]
        )
        assert len(histories[0]) == 5, f"{name} did not resume at step 5"
        assert_same(histories[0], single_process[5:])


def test_optimizer_options_are_the_configurations_not_the_checkpoints(config_path, tmp_path):
    """Also those that only another Adam has: a checkpoint of torch's loads into a fused one."""
    target = [f"run.output_dir={tmp_path / 'run'}"]
    run_distributed(train_and_save_rank, 1, config_path, target, 3)
    groups = run_distributed(
        optimizer_groups_rank,
        1,
        config_path,
        [*target, "optimizer.beta2=0.9", "optimizer.epsilon=1e-6"],
        {"bias_correction": True, "step": 0},
    )[0]
    assert len(groups) == 2
    for group in groups:
        assert group["betas"] == (0.9, 0.9)
        assert group["eps"] == 1e-6
        assert group["bias_correction"] is True
        assert group["step"] == 3
        assert type(group["step"]) is int


def test_bf16_layouts_agree_within_its_rounding(config_path):
    """bf16 keeps 8 bits: products of 64 terms summed in another order differ by about 2^-9 each,
    and the loss is a mean over 256 tokens; 2^-9 of the loss bounds it with room."""
    options = ["precision.mode=bf16"]
    expected = train_alone(config_path, *options)
    found = run_distributed(
        train_rank, 4, config_path, [*options, *LAYOUTS["TP2xPP2+SP"][1].split()]
    )[0]
    for (loss, _), (wanted, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=2**-9)


def assert_same(found, expected):
    for step, ((loss, norm), (wanted_loss, wanted_norm)) in enumerate(
        zip(found, expected, strict=True), start=1
    ):
        assert loss == pytest.approx(wanted_loss, rel=RELATIVE_BOUND), f"loss of step {step}"
        # The norm is not averaged over tokens; Adam's drift shows in it about ten times as much.
        assert norm == pytest.approx(wanted_norm, rel=1e-4), f"gradient norm of step {step}"


def test_fewer_key_value_groups_than_tensor_ranks(config_path):
    options = ["model.num_query_groups=2"]
    expected = train_alone(config_path, *options)
    found = run_distributed(train_rank, 4, config_path, [*options, "parallel.tensor=4"])[0]
    assert_same(found, expected)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_tied_embeddings_resume_at_another_layout(mode, config_path, tmp_path):
    options = [*TIED_AND_PADDED.split(), f"precision.mode={mode}"]
    expected = train_alone(config_path, *options)[5:]
    target = [*options, f"run.output_dir={tmp_path / 'run'}"]
    run_distributed(train_and_save_rank, 2, config_path, [*target, "parallel.pipeline=2"], 5)
    found = run_distributed(train_rank, 2, config_path, [*target, "parallel.tensor=2"])[0]
    assert len(found) == 5
    if mode == "fp32":
        assert_same(found, expected)
    else:
        assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=2**-9)


def test_the_bound_sees_a_forgotten_reduction(config_path, single_process):
    """Norms whose gradients are not summed over the sequence shards: the subtlest layout fault."""
    faulty = run_distributed(
        train_unreduced_norms_rank, 2, config_path, LAYOUTS["TP2+SP"][1].split()
    )
    with pytest.raises(AssertionError):
        assert_same(faulty[0], single_process)
