"""The report's twelve rows: what the document says is what the code gives; physics by hand."""

from __future__ import annotations

import json

import pytest

from litespark.config import load_config, validate
from tools.benchmarks.paper_rows import CLAIMS, DOCUMENT, EXAMPLES, RESULT, all_rows, markdown


@pytest.fixture(scope="module")
def rows():
    return all_rows()


def test_the_document_and_the_kept_rows_are_current(rows):
    assert markdown(rows) in DOCUMENT.read_text(encoding="utf-8")
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    for row, found in zip(kept, rows, strict=True):
        assert row["layout"] == found["layout"]
        key = "predicted_tokens_per_second_per_gpu"
        assert row[key] == pytest.approx(found[key])


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_row_has_a_configuration_that_runs_on_its_gpus(claim, rows):
    config = load_config(EXAMPLES / f"{claim.name}.yaml")
    assert validate(config, claim.gpus) == []
    assert config.batch.global_ == 256
    assert (config.precision.mode == "fp8") == (claim.who == "litespark")
    row = next(row for row in rows if row["name"] == claim.name)
    assert f"parallel.tensor={config.parallel.tensor}" in row["layout"]
    assert f"batch.micro={config.batch.micro}" in row["layout"]
    assert row["predicted_gib"] < 139.8


def test_watts_and_limits_by_hand(rows):
    by_name = {row["name"]: row for row in rows}
    first = by_name["3b-8-litespark"]
    # 500e9 tokens / 439,644.81 a second = 315.9 h on 8 GPUs; 0.79 MWh over 2,527 GPU-hours.
    assert first["claimed_watts_per_gpu"] == pytest.approx(312.6, rel=1e-3)
    assert first["claimed_joules_per_token"] == pytest.approx(0.79 * 3.6e9 / 500e9)
    assert first["least_joules_per_token_bf16"] == pytest.approx(14.75e9 / 989e12 * 700, rel=1e-3)
    impossible = {name for name, row in by_name.items() if "impossible" in row["verdict"]}
    assert impossible == {name for name in by_name if name.startswith("30b")}
