"""`bench --calibrate` without a GPU: what is measured, what is made of it, and how it fails."""

from __future__ import annotations

import json

import pytest
import torch

from litespark.cli import bench_calibrate
from litespark.cli.bench import build_config
from litespark.cli.main import main, parse
from litespark.errors import LitesparkError
from litespark.metering.plan.calibration import load_calibration
from tools.benchmarks.calibrations import RESULTS


def test_needs_a_gpu_and_a_folder(tmp_path, capsys):
    assert main(["bench", "--calibrate", str(tmp_path / "gpu.json")]) == 2
    assert "there is none here" in capsys.readouterr().err
    assert main(["bench", "--calibrate", str(tmp_path / "nowhere" / "gpu.json")]) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize("case", [*bench_calibrate._CASES, bench_calibrate._HOST_CASE])
def test_cases_are_benchmarks(case):
    words = [*bench_calibrate._COMMON.split(), *case.split()]
    assert build_config(parse(["bench", *words]), 1).model.num_layers <= 12


def test_a_calibration_of_measured_results_can_be_planned_with(tmp_path, monkeypatch):
    names = iter(
        [
            *("h100-paper-3b-bf16", "h100-paper-3b-fp8-delayed-fastest"),
            *("h100-paper-3b-bf16", "h100-paper-3b-bf16", "h100-llama3.2-1b-bf16"),
            "h100-paper-3b-bf16",
        ]
    )
    monkeypatch.setattr(
        bench_calibrate,
        "measure",
        lambda case, say: json.loads((RESULTS / f"{next(names)}.json").read_text()),
    )
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(bench_calibrate, "_copy_seconds", lambda: 2 * 2**30 / 3e12)
    bench_calibrate.calibrate(tmp_path / "mine.json")
    found = load_calibration(str(tmp_path / "mine.json"))
    known = load_calibration("h100-sxm")
    assert found.gpu == "mine"
    assert found.copy_bytes_per_second == pytest.approx(3e12)
    assert found.product_tflops["fp8"] == pytest.approx(known.product_tflops["fp8"], rel=1e-3)
    by_hand = 28 * 8 * 45 + 28 * 11  # launches of a step of 28 layers in BF16, 8 micro-batches
    assert found.host_seconds_per_launch == pytest.approx(1.76689 / by_hand, rel=1e-3)
    # This step keeps its GPU busy, so that it says nothing of an idle one.
    assert found.idle_watts == 50.0


def test_a_case_that_fails_is_named():
    with pytest.raises(LitesparkError, match="no-such-model"):
        bench_calibrate.measure("--model no-such-model", say=lambda text: None)
