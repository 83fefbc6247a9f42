"""The matrix of `tools/benchmarks/multi_gpu.py`, and what becomes of cases that fail or hang."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.benchmarks import multi_gpu, multi_gpu_lanes
from tools.benchmarks.multi_gpu_cases import Case, Lane, Layout, full, layouts_to_check, smoke

ROOT = Path(__file__).parents[2]


def all_cases(gpus: int, memory_gib: float = 80.0) -> list[Case]:
    phases = [
        *smoke(gpus, has_peer=True),
        *full(gpus, memory_gib, has_peer=True),
    ]
    return [case for phase in phases for lane in phase.lanes for case in lane.cases]


@pytest.mark.parametrize(("gpus", "memory_gib"), [(2, 80.0), (4, 80.0), (8, 80.0), (8, 139.0)])
def test_every_case_is_a_valid_configuration(gpus, memory_gib):
    from litespark.cli.bench import add_parser, build_config
    from litespark.config.validate import check_config

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    cases = all_cases(gpus, memory_gib)
    for case in cases:
        if case.kind in ("bench", "losses", "checkpoint"):
            config = build_config(parser.parse_args(["bench", *case.words]), case.gpus)
            check_config(config, case.gpus)
    kinds = {case.kind for case in cases}
    assert kinds == {"bench", "losses", "checkpoint", "kill", "peer"}
    assert any("30b" in case.name for case in cases) == (memory_gib > 100)


def test_peers_words_are_its_own(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    from tools.benchmarks.common import model_of
    from tools.benchmarks.peer_mcore import parser

    for case in all_cases(4):
        if case.kind == "peer":
            args = parser().parse_args(list(case.words))
            assert model_of(args).num_layers in (4, 28)
            assert args.tensor * args.pipeline * args.context <= 4


def test_the_work_of_a_gpu_is_the_same_at_every_layout():
    from tools.benchmarks.multi_gpu_cases import PAPER_3B, TOKENS_PER_GPU

    for gpus in (1, 2, 4, 8):
        for layout in [Layout(), *layouts_to_check(gpus)]:
            words = PAPER_3B.bench("fp8", layout, gpus).words
            value = {key: int(words[words.index(key) + 1]) for key in ("--accumulate",)}
            tokens = value["--accumulate"] * 4 * 4096 * layout.data(gpus)
            assert tokens == TOKENS_PER_GPU * gpus


RANK = """
import json, os, sys, time
cases, progress = json.load(open(sys.argv[1])), sys.argv[2]
first = os.environ["RANK"] == "0"
def tell(line):
    if first:
        with open(progress, "a") as file:
            file.write(json.dumps(line) + "\\n")
def wait_for_first(begin):
    # As the collectives of a real case do.
    while not os.path.exists(progress) or begin not in open(progress).read():
        time.sleep(0.02)
for case in cases:
    begin = {"event": "begin", "name": case["name"]}
    tell(begin)
    wait_for_first(json.dumps(begin) + "\\n")
    for word in case["words"]:
        if word == "fail" and not first:
            raise ValueError("a rank has failed")
        if word in ("fail", "hang"):
            time.sleep(600)
        if word == "leave":
            sys.exit(75)
    result = {"pid": os.getpid(), "visible": os.environ["CUDA_VISIBLE_DEVICES"]}
    tell({"event": "end", "name": case["name"], "result": result})
    if "linger" in case["words"]:
        time.sleep(600)
    if "leaky" in case["words"]:
        sys.exit(75)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> multi_gpu_lanes.Place:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    monkeypatch.setattr(multi_gpu_lanes, "RANK_SCRIPT", script)
    return multi_gpu_lanes.Place("cuda", tmp_path, tmp_path / "scratch")


def run_cases(place, *cases: Case, seconds: float = 120.0) -> dict[str, dict]:
    report = multi_gpu_lanes.Report(place.logs / "report.json", {})
    multi_gpu_lanes.run_lane(Lane(2, cases), place, report, time.monotonic() + seconds)
    written = json.loads(report.path.read_text())["cases"]
    assert [record["name"] for record in written] == [case.name for case in cases]
    return {record["name"]: record for record in written}


def case(name: str, *words: str, gpus: int = 2, timeout: float = 60.0) -> Case:
    return Case(name, "bench", gpus, words, timeout)


def test_cases_share_processes_and_others_go_on_after_a_failure(place):
    found = run_cases(
        place,
        case("a"),
        case("b"),
        case("c", "fail"),
        case("d", "leaky"),
        case("e"),
        case("f", gpus=1),
    )
    assert found["a"]["result"] == found["b"]["result"]
    assert found["a"]["result"]["visible"] == "2,3"
    assert found["c"]["problem"] == "rank 1 ended with exit code 1"
    assert "a rank has failed" in found["c"]["log"]
    assert found["d"]["result"]["pid"] != found["a"]["result"]["pid"]
    assert found["e"]["result"]["pid"] != found["d"]["result"]["pid"], "it leaves memory behind"
    assert found["f"]["result"]["visible"] == "2"


def test_processes_that_do_not_leave_cost_no_result(place, monkeypatch):
    monkeypatch.setattr(multi_gpu_lanes, "LEAVE_SECONDS", 0.5)
    found = run_cases(place, case("a"), case("b", "linger"), case("c", gpus=1))
    assert all("result" in found[name] for name in "abc")


def test_a_hang_is_ended_and_the_time_is_kept(place):
    found = run_cases(
        place, case("a", "hang", timeout=1.0), case("b", "hang"), case("c"), seconds=10.0
    )
    assert "took over 1 s" in found["a"]["problem"]
    assert "the time was over" in found["b"]["problem"]
    assert found["c"]["problem"].startswith("not run")


def test_what_a_case_leaves_behind_is_found():
    from litespark.ops.formats import Fp8Matrix
    from litespark.training.optimizer import FusedAdamW
    from tools.benchmarks.multi_gpu_rank import _large_tensors

    master, moment, rows, scale = (torch.zeros(2) for _ in range(4))
    adam = FusedAdamW([{"params": [master]}], {})
    adam.state[master] = {"exp_avg": moment}
    for found, expected in (
        (adam, [master, moment]),
        (Fp8Matrix(rows, None, scale), [rows, scale]),
        ("another object", []),
    ):
        held = _large_tensors(found)
        assert [tensor.data_ptr() for tensor in held] == [t.data_ptr() for t in expected]


def losses(name: str, values: list[float], reference: str | None = None) -> dict:
    return {
        "name": f"losses tiny bf16 {name}",
        "kind": "losses",
        "compared_with": f"losses tiny bf16 {reference}",
        "result": {"losses": values, "grad_norms": values},
    }


@pytest.mark.parametrize(
    ("values", "is_good"),
    [
        ([7.0, 6.0], True),
        ([7.0, 6.011], True),
        ([7.0, 6.013], False),
        ([7.0, float("nan")], False),
    ],
)
def test_losses_are_held_against_one_gpu(tmp_path, values, is_good):
    report = multi_gpu_lanes.Report(tmp_path / "report.json", {})
    report.records = [losses("1 GPU", [7.0, 6.0]), losses("TP2", values, "1 GPU")]
    assert multi_gpu.all_well(report) == is_good
    assert ("BEYOND" in multi_gpu.summary(report)) != is_good
    report.records.append({"name": "x", "kind": "bench", "problem": "rank 1 ended", "log": "words"})
    assert not multi_gpu.all_well(report)
    assert "words" in multi_gpu.summary(report)


@pytest.mark.distributed
def test_a_layout_is_compared_for_real(tmp_path):
    """On the CPU: one process, then two under tensor parallelism."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "tools/benchmarks/multi_gpu.py"), "--device", "cpu"]
    command += ["--gpus", "2", "--only", "losses tiny fp32 TP2", "--json", str(out)]
    command += ["--logs", str(tmp_path / "logs"), "--seconds", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=520)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = json.loads(out.read_text())["cases"]
    assert two["compared_with"] == one["name"]
    assert two["result"]["losses"] == pytest.approx(one["result"]["losses"], rel=1e-5)
    assert two["result"]["losses"][-1] < two["result"]["losses"][0]
