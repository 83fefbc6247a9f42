"""The planner against published runs: the kept table is what the code gives, and within bounds."""

from __future__ import annotations

import json

import pytest

from tools.benchmarks.published_runs import DOCUMENT, TABLE, markdown, median_error, rows


@pytest.fixture(scope="module")
def found():
    return rows()


def test_the_median_is_within_fifteen_percent(found):
    assert len(found) >= 10
    assert median_error(found) < 15
    assert {row["gpus"] for row in found} >= {8, 64, 128, 256, 512}


def test_the_kept_table_and_the_document_are_current(found):
    kept = json.loads(TABLE.read_text())
    assert [row["predicted"] for row in kept] == pytest.approx([r["predicted"] for r in found])
    assert markdown(found) in DOCUMENT.read_text()
