"""A few pairs of `tools/soak/layout_matrix.py`: other layouts and precisions, the state whole."""

from __future__ import annotations

import pytest

from tools.soak.layout_matrix import (
    BOUNDS,
    Matrix,
    Place,
    bf16,
    differing_tensors,
    fp8,
    fp32,
    losses,
    off_by,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (bf16("PP2 VPP2")[0], bf16("DP2 replicated")[0]),
        (fp8("TP2 SP")[0], fp8("DP2")[0]),
    ],
    ids=str,
)
def test_a_moved_run_goes_on_as_if_it_had_not_been(source, target, matrix):
    saved = matrix.save(source)
    moved = matrix.load(saved, target)
    assert off_by(losses(moved), losses(saved)) <= BOUNDS[target.mode]
    compared, differing = differing_tensors(saved, moved)
    assert compared > 20
    assert differing == []


def test_fp32_goes_on_in_bf16_with_its_weights_as_masters(matrix):
    saved = matrix.save(fp32("DP2")[0])
    moved = matrix.load(saved, Place("TP2", "bf16", "triton"))
    compared, differing = differing_tensors(saved, moved)
    assert compared > 30, "without the masters"
    assert differing == []
    lost = matrix.load(saved, fp32("DP2")[0], loses_moments=True)
    assert off_by(losses(lost), losses(saved)) > BOUNDS["fp32"], "lost moments go unseen"
    assert all(".exp_avg" in key for key in differing_tensors(saved, lost)[1])
    assert differing_tensors(saved, lost)[1]
