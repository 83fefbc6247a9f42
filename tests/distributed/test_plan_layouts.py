"""The planner's bytes are those that megatron-core and the optimizer allocate, to the byte.

All layouts: `python -m tools.checks.plan_layouts`, whose result is kept and read here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.checks.plan_layouts import LAYOUTS, compare_layouts

HANDFUL = [
    "DP2, replicated",
    "TP2, biases and norms of queries and keys",
    "PP2, tied",
    "PP2 x VPP2",
]
RESULT = Path(__file__).parents[2] / "tools" / "checks" / "results" / "plan_layouts.json"


@pytest.mark.distributed
def test_planned_bytes_are_the_real_ones(tmp_path):
    found = compare_layouts(tmp_path, HANDFUL)
    assert set(found) == set(HANDFUL)
    for name, ranks in found.items():
        for rank, (planned, real) in enumerate(ranks):
            assert planned == real, f"{name}, rank {rank}"


def test_the_kept_result_is_of_all_layouts_and_exact():
    kept = json.loads(RESULT.read_text())
    assert set(kept) == set(LAYOUTS)
    assert len(kept) >= 20
    for name, ranks in kept.items():
        assert len(ranks) == LAYOUTS[name][0]
        assert all(rank["planned"] == rank["real"] for rank in ranks), name
