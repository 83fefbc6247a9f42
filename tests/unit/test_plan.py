"""The planner against sums made by hand, our own measured steps, and what holds of any model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from litespark.cli.bench import build_config
from litespark.cli.main import main, parse
from litespark.config.presets import PRESETS
from litespark.errors import LitesparkError, UserError
from litespark.metering.plan.activations import head_bytes, layer_bytes
from litespark.metering.plan.calibration import BUILT_IN, load_calibration
from litespark.metering.plan.communication import (
    NETWORKS,
    gather_seconds,
    network_of,
    reduce_seconds,
)
from litespark.metering.plan.energy import step_joules
from litespark.metering.plan.fit import Subject, config_of, fit
from litespark.metering.plan.launches import launches
from litespark.metering.plan.memory import in_flight, memory_plan, model_bytes
from litespark.metering.plan.parameters import Parameter, lay_out, layers_of_chunk
from litespark.metering.plan.search import Cluster, Plan, best_of_each_kind, search
from litespark.metering.plan.time import step_time
from litespark.metering.plan.work import layer_work
from tests.support.configs import loader
from tools.benchmarks.calibrations import RESULTS, TARGET, built_in, records_of, text_of
from tools.benchmarks.plan_validation import layouts, repredict

GIB = 2**30
CALIBRATED = str(RESULTS / "h200-plan-calibration.json")
MEASURED = sorted(
    path
    for path in RESULTS.glob("h[12]00-*.json")
    if json.loads(path.read_text()).get("implementation") == "litespark"
    and json.loads(path.read_text()).get("gpus") == 1
)

PAPER_3B = """\
run: {output_dir: out}
model: {preset: paper-3b}
data: {blend: [{prefix: shard}], sequence_length: 4096}
batch: {micro: 2, global: 256}
optimizer: {lr: 1e-3}
training: {steps: 10}
"""


@pytest.fixture
def paper_3b(tmp_path):
    return loader(tmp_path, PAPER_3B)


def cluster(gpus, gpu="h200-sxm", network="infiniband"):
    return Cluster(gpus, load_calibration(gpu), network_of(network, min(8, gpus)))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_measured_steps_are_predicted(path):
    """Every committed step of one GPU; the calibrations are made from some of them."""
    record = json.loads(path.read_text())
    config = config_of(record)
    gpu = "h200-sxm" if "H200" in record["device"] else "h100-sxm"
    memory = memory_plan(config, 1).peak / GIB
    assert memory == pytest.approx(record["peak_memory_gib"], rel=0.01)
    seconds = step_time(config, 1, load_calibration(gpu), NETWORKS["efa"]).total
    assert seconds == pytest.approx(record["step_seconds"]["median"], rel=0.07)  # the goal


def test_what_was_predicted_and_then_measured():
    """Within the goals of 5 % of memory, 7 % of time and of energy, as the planner is today."""
    kept = json.loads((RESULTS / "h100-plan-validation.json").read_text())
    again = repredict(kept, kept["gpu"])
    assert len(again) >= 4
    for name, row in again.items():
        off = row["percent_off"]
        assert abs(off["memory_gib"]) < 5, name
        assert abs(off["step_seconds"]) < 7, name
        assert abs(off["joules_per_1000_tokens"]) < 7, name


def test_what_was_predicted_on_an_h200():
    """With the calibration of that day; the host's speed moved by half within the hour."""
    kept = json.loads((RESULTS / "h200-plan-validation.json").read_text())
    again = repredict(kept, CALIBRATED)
    host_bound = {"paper-3b fp8 tensorwise mb2", "llama-160m bf16 mb1 s256"}
    assert host_bound < set(again)
    for name, row in again.items():
        off = row["percent_off"]
        assert abs(off["memory_gib"]) < 5, name
        assert abs(off["step_seconds"]) < (40 if name in host_bound else 7), name
        waits = row["predicted"]["time_parts"]["host"]
        assert (waits > 0) == (name in host_bound), name


def test_layouts_that_were_measured_on_four_gpus():
    kept = json.loads((RESULTS / "h200x4-paper-3b.json").read_text())
    found = layouts(kept, CALIBRATED)
    assert len(found) == 12
    for name, row in found.items():
        off = row["percent_off"]
        assert abs(off["memory_gib"]) < 2, name
        if "TP" not in name and "CP" not in name:  # those are not understood yet
            assert abs(off["step_seconds"]) < 7, name


def test_a_step_is_no_faster_than_its_hosts_launches(paper_3b):
    known, network = load_calibration("h200-sxm"), NETWORKS["infiniband"]
    slow = known.model_copy(update={"host_seconds_per_launch": 1e-3})
    config = paper_3b("batch.global=16")  # 8 micro-batches
    step = step_time(config, 1, slow, network)
    assert step.total == pytest.approx(1e-3 * 28 * (8 * 45 + 11))
    assert step.host > 0.7 * step.total
    idle, busy = known.idle_watts, known.busy_watts["bf16"]
    watts = step_joules(config, step, slow) / step.total
    assert idle < watts < idle + 0.25 * (busy - idle)
    # A pipeline stage launches for its own layers, and its bubble is as slow as they are.
    halves = step_time(paper_3b("batch.global=16", "parallel.pipeline=2"), 2, slow, network)
    stage = 1e-3 * (14 * (8 * 45 + 11) + 8 * 4)
    assert stage < halves.total < stage * 9 / 8 + 0.2
    assert step_time(config, 1, known, network).host == 0
    replayed = paper_3b("batch.global=16", "training.cuda_graph=true")
    assert step_time(replayed, 1, slow, network).host == 0


def test_launches_go_by_the_linears_format(paper_3b):
    def of_layer(*overrides):
        config = paper_3b("batch.global=16", *overrides)
        several, one = (launches(config, [range(1, 29)], n) for n in (9, 8))
        return (several - one) / 28

    fp8 = "precision.mode=fp8"
    delayed = of_layer(fp8)
    assert of_layer() < delayed < of_layer(fp8, "precision.recipe=blockwise")
    # Nine points: a zero and a scale each, four searched for the largest value, five quantised.
    assert of_layer(fp8, "precision.recipe=tensorwise") == delayed + 9 * 2 + 4 + 5
    assert of_layer(fp8, "precision.bf16_first_layers=14") == (of_layer() + delayed) / 2
    assert of_layer("training.recompute=full") == pytest.approx(of_layer() * 4 / 3)


def test_launches_are_those_of_profiled_steps():
    names = ["h100-paper-3b-bf16", "h100-paper-3b-fp8-delayed-fastest"]
    names += ["h200-paper-3b-bf16", "h200-paper-3b-fp8-delayed-fastest"]
    for record in records_of(names):
        counted = launches(config_of(record), [range(1, 29)], record["accumulate"])
        assert counted == pytest.approx(record["breakdown"]["kernels"], rel=0.01)
    (profiles,) = records_of(["h200x2-paper-3b-profiles"])
    cases = [case for case in profiles["cases_with_1_connections"] if "result" in case]
    assert [case["name"] for case in cases] == ["fp8 TP2+SP", "fp8 PP2", "fp8 PP2x2"]
    for case in cases:
        config = build_config(parse(["bench", *case["words"]]), 2)
        chunks = range(config.parallel.virtual_pipeline)
        held = [layers_of_chunk(config.model, config.parallel, 0, chunk) for chunk in chunks]
        counted = launches(config, held, 8)
        assert counted == pytest.approx(case["result"]["breakdown"]["kernels"], rel=0.01)


def test_current_scales_move_more_than_delayed_ones(paper_3b):
    t, h, q, kv, f = 2 * 4096, 2048, 2048, 256, 11008

    def moved(*overrides):
        work = layer_work(paper_3b("precision.mode=fp8", *overrides), fp8=True)
        return work.forward_bytes, work.backward_bytes

    kept = "precision.fc1_output=fp8_kept"
    delayed, current = moved(kept), moved(kept, "precision.recipe=tensorwise")
    # Forward: two norms, attention's largest value, FC1's, and SwiGLU's output in BF16 and again.
    assert current[0] - delayed[0] == 2 * 4 * t * h + 2 * t * q + 4 * t * f + 4 * t * f
    # Backward: the largest values of two gradients; QKV's and FC1's gradients in a pass of theirs.
    assert current[1] - delayed[1] == 2 * 2 * t * h + 4 * t * (q + 2 * kv) + 8 * t * f


def test_a_layers_activations_are_what_the_blocks_save(paper_3b):
    """paper-3b, bf16, micro-batch 2: summed by hand from the blocks' `save_for_backward`."""
    t, h, q, kv, f, heads = 2 * 4096, 2048, 2048, 256, 11008, 16
    by_hand = (
        2 * t * h  # input of the attention block
        + 2 * t * h  # its norm's output
        + 2 * t * (q + 2 * kv)  # query, key, value
        + 2 * t * q  # attention's output
        + 4 * t * heads  # and its logarithms of sums
        + 2 * t * q  # the same in [s, b] order, for the projection
        + 2 * t * h  # input of the MLP block
        + 2 * t * h  # its norm's output
        + 2 * t * 2 * f  # gate and up
        + 2 * t * f  # their product
        + 2 * 4 * t  # both norms' factors
    )
    assert layer_bytes(paper_3b(), fp8=False).kept == by_hand
    full = paper_3b("training.recompute=full")
    assert layer_bytes(full, fp8=False).kept == 2 * t * h
    selective = layer_bytes(paper_3b("training.recompute=selective"), fp8=False)
    assert by_hand - selective.kept == 2 * t * q + 4 * t * heads


def test_fp8_keeps_columns_and_sequence_parallelism_rows(paper_3b):
    t, h, q, kv, f = 2 * 4096, 2048, 2048, 256, 11008
    alone = layer_bytes(paper_3b("precision.mode=fp8"), fp8=True).kept
    common = 2 * t * (q + 2 * kv) + 2 * t * q + 4 * t * 16 + t * q + 2 * f * t
    assert alone == common + 2 * (2 * t * h + t * h) + 8 * t
    split = paper_3b("precision.mode=fp8", "parallel.tensor=2", "parallel.sequence=true")
    halves = common // 2 + 2 * (2 * t * h + t * h) // 2 + 8 * t // 2
    assert layer_bytes(split, fp8=True).kept == halves


def test_the_head_holds_one_chunk_of_logits_and_its_weights_gradient(paper_3b):
    head = head_bytes(paper_3b())
    t, h, v = 2 * 4096, 2048, 32000
    assert head.forward_peak == 3 * 2 * t * h + 4 * v * h + 2 * 4096 * v


def test_bytes_of_one_gpu_are_eighteen_a_parameter(paper_3b):
    found = model_bytes(paper_3b(), 1, 0)
    parameters = 2_289_158_144
    # Each begins at a multiple of 64, which all sizes of this model are.
    assert found == {
        "weights": 2 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 12 * parameters,
    }
    sixteen = [model_bytes(paper_3b(), 16, 0, shard)["optimizer"] for shard in range(16)]
    assert sum(sixteen) == 12 * parameters


def test_buckets_are_padded_and_shared_embeddings_stand_alone():
    parameters = [Parameter("a", 100, has_own_bucket=True), Parameter("b", 70), Parameter("c", 10)]
    laid = lay_out(parameters, 3, None, sharded=True)
    # Last first: c from 0, b from 64, then a in a bucket of its own; lcm(3, 128) = 384.
    assert laid.spans == ((0, 10), (64, 134), (384, 484))
    assert laid.buckets == ((0, 384), (384, 768))
    assert [laid.owned(shard, 3) for shard in range(3)] == [10 + 64 + 100, 6, 0]
    plain = lay_out(parameters, 3, None, sharded=False)
    assert plain.numel == 180


def test_micro_batches_in_flight(paper_3b):
    pipelined = paper_3b("parallel.pipeline=4", "batch.micro=1")
    assert [in_flight(pipelined, 4, stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = paper_3b("parallel.pipeline=4", "parallel.virtual_pipeline=7", "batch.micro=1")
    assert in_flight(interleaved, 4, 0) == (3 * 2 + 6 * 4 + 1) / 7
    assert in_flight(paper_3b("parallel.pipeline=4", "batch.global=2"), 4, 0) == 1


def test_messages_take_what_their_bytes_and_hops_take():
    network = NETWORKS["infiniband"]
    one = gather_seconds(8e9, 8, 1, network)
    assert one == pytest.approx(7 / 8 * 8e9 / 360e9 + 7 * 3e-6 + 8e-6)
    # Two nodes, all eight adapters: NVLink is the narrower; at a stride of 8 each has its own.
    assert gather_seconds(8e9, 16, 1, network) < gather_seconds(8e9, 2, 8, network) * 2
    assert gather_seconds(8e9, 2, 8, network) == pytest.approx(4e9 / 46e9, rel=1e-3)
    # Small sums between many ranks take a tree.
    assert reduce_seconds(1e3, 512, 1, network) < 2 * 511 * network.link_latency_seconds
    assert reduce_seconds(1e9, 1, 1, network) == 0.0


def test_a_pipelines_bubble_shrinks_with_chunks_and_micro_batches(paper_3b):
    calibration, network = load_calibration("h100-sxm"), NETWORKS["infiniband"]

    def bubble(*overrides):
        config = paper_3b("parallel.pipeline=4", "batch.micro=1", *overrides)
        step = step_time(config, 4, calibration, network)
        return step.bubble / step.total

    assert bubble("batch.global=8") > bubble("batch.global=64")
    assert bubble("batch.global=8") > bubble("batch.global=8", "parallel.virtual_pipeline=7")


def test_recomputation_costs_a_forward_pass_and_not_more(paper_3b):
    calibration, network = load_calibration("h100-sxm"), NETWORKS["infiniband"]
    none, selective, full = (
        step_time(paper_3b(f"training.recompute={mode}"), 1, calibration, network)
        for mode in ("none", "selective", "full")
    )
    assert none.recompute == 0 < selective.recompute < full.recompute
    assert full.recompute < (none.products + none.attention + none.between) / 2.5
    assert full.products == none.products


def test_search_finds_the_fastest_that_fits_and_says_why_others_lose(paper_3b):
    plans = search(paper_3b("precision.mode=fp8"), cluster(8))
    fitting = [plan for plan in plans if plan.fits]
    assert plans[0] is fitting[0]
    assert plans[0].verdict == ""
    assert [p.step.total for p in fitting] == sorted(p.step.total for p in fitting)
    assert all("slower" in p.verdict or p.verdict == "as fast" for p in fitting[1:])
    assert all(p.verdict.startswith("memory over by") for p in plans if not p.fits)
    degrees = plans[0].config.parallel
    assert (degrees.tensor, degrees.pipeline, degrees.context) == (1, 1, 1)
    assert plans[0].config.training.recompute == "none"
    kinds = best_of_each_kind(fitting, 5)
    assert len({str(p.overrides()[:4]) for p in kinds}) == 5


def test_search_splits_a_model_that_one_gpu_cannot_hold(tmp_path):
    text = PAPER_3B.replace("paper-3b", "llama3-70b")
    plans = search(loader(tmp_path, text)("model.max_sequence_length=8192"), cluster(16))
    assert all(p.config.parallel.tensor * p.config.parallel.pipeline > 1 for p in plans if p.fits)
    alone = Plan(loader(tmp_path, text)("batch.micro=1"), cluster(16))
    assert not alone.fits


def test_a_thousand_gpus_are_searched_in_seconds(tmp_path):
    text = PAPER_3B.replace("paper-3b", "llama3-70b").replace("256", "1024")
    started = time.process_time()
    plans = search(loader(tmp_path, text)(), cluster(1024))
    print(f"{len(plans)} layouts in {time.process_time() - started:.1f} CPU s")
    assert len(plans) > 1000


def test_energy_of_a_computing_gpu_is_its_measured_power(paper_3b):
    plan = Plan(paper_3b("batch.global=16"), cluster(1, "h100-sxm"))
    watts = plan.joules_per_token * plan.tokens_per_second
    assert 600 < watts < 700
    assert plan.days(plan.tokens_per_second * 86400) == pytest.approx(1)
    assert plan.megawatt_hours(3.6e9 / plan.joules_per_token) == pytest.approx(1)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"llama3-70b"}))
def test_every_preset_is_below_its_peak_and_fits_somewhere(tmp_path, preset):
    length = min(4096, PRESETS[preset]["max_sequence_length"])
    text = PAPER_3B.replace("paper-3b", preset).replace("4096", str(length))
    best = search(loader(tmp_path, text)("batch.global=16"), cluster(16))[0]
    assert best.fits
    assert best.mfu is not None
    assert 0 < best.mfu < 0.75


def test_built_in_calibrations_are_what_the_results_give():
    for name, calibration in built_in().items():
        assert (TARGET / f"{name}.json").read_text() == text_of(calibration)
    assert set(built_in()) == set(BUILT_IN)


def test_a_calibration_needs_a_breakdown():
    record = json.loads((RESULTS / "h100-paper-3b-bf16.json").read_text()) | {"breakdown": None}
    subject = Subject("x", 80, 3e12, "none")
    with pytest.raises(LitesparkError, match="breakdown"):
        fit([record], subject)


def test_unknown_gpus_and_broken_calibrations_are_named(tmp_path):
    with pytest.raises(UserError, match="h100-sxm, h200-sxm"):
        load_calibration("b300")
    path = tmp_path / "gpu.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="is no calibration"):
        load_calibration(str(path))
    with pytest.raises(UserError, match="infiniband, efa"):
        network_of("pigeons", 8)


def test_the_command_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(PAPER_3B)
    target = tmp_path / "plan.json"
    options = ["--gpus", "8", "--gpu", "h200-sxm", "--json", str(target), "--tokens", "500e9"]
    assert main(["plan", str(path), *options]) == 0
    out = capsys.readouterr().out
    assert "as written" in out
    assert "parallel.tensor=1" in out
    record = json.loads(target.read_text())
    best = record["plans"][0]
    assert record["tokens"] == 500e9
    assert best["memory_bytes"]["needed"] < 139.8 * GIB
    parts = best["step_seconds"]
    assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k != "total"))
    assert best["days"] == pytest.approx(500e9 / best["tokens_per_second"] / 86400)


@pytest.mark.parametrize(
    ("words", "is_said"),
    [
        (["--gpus", "256"], True),  # one sample a GPU, faster than its host launches it
        (["--gpus", "256", "training.cuda_graph=true"], False),
        (["--gpus", "256", "model.backend=reference"], False),  # cannot be recorded
        (["--gpus", "8"], False),
    ],
)
def test_waiting_for_the_host_is_said(tmp_path, capsys, words, is_said):
    path = tmp_path / "run.yaml"
    path.write_text(PAPER_3B)
    assert main(["plan", str(path), "--gpu", "h200-sxm", *words]) == 0
    assert ("add training.cuda_graph=true" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "8", "--nodes", "3"], "--nodes 3"),
        (["--gpus", "11"], "cannot be divided"),
        (["--gpus", "8", "--tokens", "-1"], "is no budget"),
        (["--gpus", "8", "--json", "/nowhere/plan.json"], "no folder"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, options, message):
    path = tmp_path / "run.yaml"
    path.write_text(PAPER_3B)
    assert main(["plan", str(path), *options]) == 2
    assert message in capsys.readouterr().err


def test_every_calibration_is_shipped_with_the_package():
    assert {Path(path).stem for path in TARGET.glob("*.json")} == set(BUILT_IN)
