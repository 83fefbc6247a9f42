"""The fused blocks against plain megatron-core, at every layout, in fp32, BF16 and FP8.

On a CPU the blocks run on the torch references of their kernels, so what is tested is the blocks:
their order of operations, what they keep for backward, their collectives, `main_grad`.  Bounds as
in `test_layouts.py`: the fused blocks sum in other orders, which is all that may differ.
"""

from __future__ import annotations

import pytest

from tests.distributed.test_layouts import LAYOUTS, TIED_AND_PADDED, assert_same, options_of
from tests.support.runs import (
    train_alone,
    train_and_save_rank,
    train_rank,
    write_config,
    write_shard,
)
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

FUSED = "model.backend=triton"
FP8 = [FUSED, "precision.mode=fp8"]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fused_layouts")
    shard = write_shard(folder / "tokens")
    return write_config(folder, shard)


@pytest.fixture(scope="module")
def reference(config_path):
    return train_alone(config_path, "model.backend=reference")


@pytest.mark.parametrize("name", ["one process", *LAYOUTS])
def test_fused_blocks_equal_the_reference_at_every_layout(name, config_path, reference):
    world_size, options = options_of(name)
    histories = run_distributed(train_rank, world_size, config_path, [FUSED, *options])
    assert all(history == histories[0] for history in histories), "ranks disagree on the loss"
    assert_same(histories[0], reference)


@pytest.mark.parametrize("layout", ["", "parallel.tensor=2", "parallel.pipeline=2"])
def test_tied_embeddings_and_padded_vocabulary(layout, config_path):
    options = TIED_AND_PADDED.split()
    expected = train_alone(config_path, *options)
    world_size = 2 if layout else 1
    found = run_distributed(
        train_rank, world_size, config_path, [FUSED, *options, *layout.split()]
    )[0]
    assert_same(found, expected)


def test_bf16_equals_the_reference_within_its_rounding(config_path):
    """2^-9 of the loss, as between two layouts of the reference."""
    options = ["precision.mode=bf16"]
    expected = train_alone(config_path, *options)
    found = train_alone(config_path, FUSED, *options)
    for (loss, _), (wanted, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=2**-9)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_learns_as_bf16_does(recipe, config_path):
    """E4M3 rounds each operand by at most 2^-4 of itself, in random directions.

    A product of 64 terms is then off by about 2^-4 / sqrt(3) / sqrt(64) = 0.5 % of its size, and
    about 30 of them one after the other by 2.5 %.  The logits' effect on the loss is of first order
    in each token and random in sign: over 256 tokens 2.5 % / sqrt(256) = 0.16 % of what the logits
    move the loss by, here a few percent of it.  2e-3 bounds that with room (measured: 1.6e-4), and
    weights that are quantised once and never again, a fault that was made, are 1.3e-2 off.
    """
    expected = train_alone(config_path, "precision.mode=bf16")
    found = train_alone(config_path, *FP8, f"precision.recipe={recipe}")
    assert found != expected, "nothing was computed in FP8"
    for (loss, norm), (wanted, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=2e-3)
        assert norm == pytest.approx(wanted_norm, rel=0.1)
    assert found[-1][0] < 0.98 * found[0][0], "does not learn"


@pytest.mark.parametrize(
    "name", ["TP2", "TP2+SP", "PP2", "TP2xPP2+SP", "CP2", "TP2+SP full recompute", "TP2xDP2"]
)
def test_fp8_layouts_agree(name, config_path):
    """Scales are shared by all ranks, except of weights, where each rank scales its own part.

    So the numbers differ by FP8's rounding of weights, 2^-4 at random: the bound is as above.
    """
    world_size, options = options_of(name)
    expected = train_alone(config_path, *FP8)
    found = run_distributed(train_rank, world_size, config_path, [*FP8, *options])
    assert all(history == found[0] for history in found), "ranks disagree on the loss"
    assert found[0][0][1] == pytest.approx(expected[0][1], rel=3e-2)
    for (loss, _), (wanted, _) in zip(found[0], expected, strict=True):
        assert loss == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [("reference", "triton"), ("triton", "reference")],
)
def test_a_checkpoint_moves_between_backends(saved_by, loaded_by, config_path, reference, tmp_path):
    target = [f"run.output_dir={tmp_path / 'run'}"]
    run_distributed(
        train_and_save_rank,
        2,
        config_path,
        [*target, f"model.backend={saved_by}", "parallel.tensor=2"],
        5,
    )
    found = run_distributed(
        train_rank, 2, config_path, [*target, f"model.backend={loaded_by}", "parallel.pipeline=2"]
    )[0]
    assert len(found) == 5, "did not resume at step 5"
    assert_same(found, reference[5:])


def test_fp8_resumes_bit_for_bit(config_path, tmp_path):
    """The delayed scales come back with the checkpoint."""
    expected = run_distributed(train_rank, 2, config_path, [*FP8, "parallel.pipeline=2"])[0]
    target = [*FP8, "parallel.pipeline=2", f"run.output_dir={tmp_path / 'run'}"]
    run_distributed(train_and_save_rank, 2, config_path, target, 5)
    found = run_distributed(train_rank, 2, config_path, target)[0]
    assert found == expected[5:]


def test_layers_kept_in_bf16_are(config_path):
    """All but one layer in BF16 is nearer to BF16 than all in FP8."""
    bf16 = train_alone(config_path, FUSED, "precision.mode=bf16")
    most = train_alone(config_path, *FP8, "precision.bf16_first_layers=3")
    none = train_alone(config_path, *FP8)

    def distance(history):
        return sum(abs(norm - wanted) for (_, norm), (_, wanted) in zip(history, bf16, strict=True))

    assert 0 < distance(most) < distance(none)
