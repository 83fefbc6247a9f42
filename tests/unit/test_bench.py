"""What `litespark bench` computes from times and kernel names, and how it talks to the peer."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent

from litespark.cli import bench, bench_peer
from litespark.cli.bench_table import kernel_table, result_table
from litespark.cli.main import parse
from litespark.config.schema import ModelConfig
from litespark.errors import ExitCode, LitesparkError, UserError
from litespark.metering.breakdown import (
    IDLE,
    OTHER,
    Kernel,
    break_down,
    covered_us,
    family_of,
    kernels_of,
)
from litespark.metering.flops import flops_per_token
from litespark.metering.measurement import Timing, Work, figures, time_steps

ROOT = Path(__file__).parents[2]
H100 = "NVIDIA H100 80GB HBM3"

# As torch's profiler prints them on an H100, by the library that launches them.
RECORDED = [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
    ("nvjet_qqtst_128x256_128x6_2x1_v_bz_coopA_TNN", "matrix products"),
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matrix products"),
    ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8_stage3", "matrix products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matrix products"),
    ("void gemv2T_kernel_val<int, int, float, float, float>", "matrix products"),
    ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "matrix products"),
    ("kernel_cutlass_kernel_quackgemm_sm90GemmSm90_object_at__tiled", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64", "attention"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>", "attention"),
    ("void cudnn::fusion::convert_dq_to_16bits<true>", "attention"),
    ("void cudnn::fusion::fmha_reduce_head<true>", "attention"),
    (
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at",
        "attention",
    ),
    (
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttentionBackwardPreprocess",
        "attention",
    ),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
    ("void transformer_engine::normalization::rmsnorm_bwd_finalize_tuned_kernel<...>", "norm"),
    ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<...>", "norm"),
    ("void transformer_engine::detail::dgated_act_cast_transpose_kernel<...>", "swiglu"),
    ("void transformer_engine::gated_kernel<8, float, ...swish...>", "swiglu"),
    ("triton_poi_fused__to_copy_add_mul_sigmoid_silu_split_0", "swiglu"),
    ("void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>", "rope"),
    ("void transformer_engine::detail::cast_transpose_optimized_kernel<...>", "quantise"),
    ("void transformer_engine::transpose_general_kernel<unsigned char>", "quantise"),
    ("void transformer_engine::amax_kernel<8, true, __nv_bfloat16>", "quantise"),
    ("void at::native::unrolled_elementwise_kernel<float8_copy_kernel_cuda...>", "quantise"),
    ("void transformer_engine::multi_tensor_adam::AdamFunctorMaster<...>", "optimizer"),
    ("void multi_tensor_apply_kernel<TensorListMetadata<2>, L2NormFunctor<float>>", "optimizer"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
    ("void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float>>>", "optimizer"),
    ("online_softmax_kernel", "cross-entropy"),
    ("cross_entropy_kernel", "cross-entropy"),
    ("Memset (Device)", "memory set, copy"),
    ("Memcpy DtoD (Device -> Device)", "memory set, copy"),
    ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>", "memory set, copy"),
    ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "memory set, copy"),
    ("void at::native::CatArrayBatchedCopy_alignedK_contig<...>", "memory set, copy"),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", "communication"),
    ("ncclDevKernel_Broadcast_RING_LL", "communication"),
    ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<BFloat16>>", OTHER),
    ("void at::native::(anonymous namespace)::indexSelectLargeIndex<...>", OTHER),
]  # fmt: skip

# The family of each file of litespark/ops that launches kernels.
FAMILY_OF_FILE = {
    "adamw.py": "optimizer",
    "global_norm.py": "optimizer",
    "linear_cross_entropy.py": "cross-entropy",
    "quantize.py": "quantise",
    "blockwise.py": "quantise",
    "rms_norm.py": "norm",
    "swiglu.py": "swiglu",
    "rope.py": "rope",
}


@pytest.mark.parametrize(("name", "family"), RECORDED, ids=[name[:50] for name, _ in RECORDED])
def test_recorded_kernels_are_recognised(name, family):
    assert family_of(name) == family


def our_kernels() -> dict[str, list[str]]:
    """Every Triton kernel of litespark/ops that is launched, with the files that define it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "litespark" / "ops").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                found.setdefault(node.name, []).append(path.name)
    return found


def test_our_own_kernels_are_recognised():
    """The profiler knows a Triton kernel by its function's name alone, so names must differ."""
    kernels = our_kernels()
    assert kernels
    for name, files in kernels.items():
        assert len(files) == 1, f"{name} is defined in {files}"
        assert family_of(name) == FAMILY_OF_FILE[files[0]], f"{files[0]}: {name}"


def test_covered_time_counts_overlapping_kernels_once():
    kernels = [Kernel("c", 30, 40), Kernel("a", 0, 10), Kernel("b", 5, 20), Kernel("a", 6, 8)]
    assert covered_us(kernels) == 20 + 10
    assert covered_us([]) == 0


def test_parts_add_up_to_the_step():
    kernels = [
        Kernel("nvjet_tst", 0, 60),
        Kernel("nvjet_tst", 60, 100),
        Kernel("ncclDevKernel_AllReduce", 90, 130),  # 10 us beside the product
        Kernel("flash_fwd", 130, 150),
        Kernel("something", 170, 175),
    ]
    result = break_down(kernels, wall_seconds=200e-6, tokens=10)
    parts = result["parts_us_per_token"]
    assert parts["matrix products"] == pytest.approx(10)
    assert parts["attention"] == pytest.approx(2)
    assert parts["everything else"] == pytest.approx(4.5)
    assert parts["optimizer"] == 0
    assert parts[IDLE] == pytest.approx((200 - 155) / 10)
    assert result["overlapped_us_per_token"] == pytest.approx(1)
    assert sum(parts.values()) - result["overlapped_us_per_token"] == pytest.approx(20)
    assert result["everything_else_us_per_token"] == pytest.approx(
        {"communication": 4, "other": 0.5}
    )
    assert [kernel["name"] for kernel in result["top_kernels"]][:2] == [
        "nvjet_tst",
        "ncclDevKernel_AllReduce",
    ]
    assert result["top_kernels"][0]["count"] == 2
    json.dumps(result, allow_nan=False)


def test_only_kernels_are_taken_from_the_profiler():
    def event(name: str, device: str, **other: object) -> FunctionEvent:
        kind = getattr(torch.autograd.DeviceType, device)
        return FunctionEvent(
            id=0, name=name, thread=0, start_us=1.5, end_us=4.0, device_type=kind, **other
        )

    events = [
        event("cudaLaunchKernel", "CPU"),
        event("nvjet_tst", "CUDA"),
        event("nccl:all_reduce", "CUDA", is_user_annotation=True),
    ]
    assert kernels_of(events) == [Kernel("nvjet_tst", 1.5, 4.0)]


def test_steps_are_timed_one_by_one(monkeypatch):
    clock = itertools.count()  # each reading is a second later
    monkeypatch.setattr("litespark.metering.measurement.time.perf_counter", lambda: next(clock))
    joules = iter([100.0, 160.0])
    energy = types.SimpleNamespace(read_joules=lambda: next(joules))
    calls = []
    timing = time_steps(
        lambda: calls.append("step"),
        3,
        lambda: calls.append("wait"),
        energy,  # type: ignore[arg-type]
    )
    assert calls == ["wait", *["step", "wait"] * 3]
    assert timing == Timing([1, 1, 1], 7, 60.0)


def work(device_name: str, gpus: int = 1, tokens: int = 131072) -> Work:
    return Work(ModelConfig(preset="paper-3b"), 4096, tokens, "fp8", device_name, gpus)  # type: ignore[call-arg]


def test_figures_are_those_of_the_median_step():
    timing = Timing([2.0, 2.5, 4.0], region_seconds=9.0, joules=4500.0)
    result = figures(work(H100), timing)
    assert result["n"] == 3
    assert result["tokens_per_second"] == 131072 / 2.5
    assert (result["tokens_per_second_min"], result["tokens_per_second_max"]) == (
        131072 / 4,
        131072 / 2,
    )
    per_token = flops_per_token(ModelConfig(preset="paper-3b"), 4096, causal=True)  # type: ignore[call-arg]
    assert result["tflops_per_gpu_causal"] == pytest.approx(131072 / 2.5 * per_token / 1e12)
    assert result["tflops_per_gpu_full"] > result["tflops_per_gpu_causal"]
    assert result["mfu"] == pytest.approx(result["tflops_per_gpu_causal"] / 989)
    assert result["joules_per_1000_tokens"] == pytest.approx(4500 / (3 * 131.072))
    assert result["watts_per_gpu"] == pytest.approx(500)


def test_figures_are_per_gpu():
    one = figures(work(H100), Timing([2.5], 2.5, 1000.0))
    two = figures(work(H100, gpus=2, tokens=2 * 131072), Timing([2.5], 2.5, 2000.0))
    for key in ("tokens_per_second_per_gpu", "mfu", "watts_per_gpu", "joules_per_1000_tokens"):
        assert two[key] == pytest.approx(one[key])
    assert two["tokens_per_second"] == 2 * one["tokens_per_second"]


def test_a_rate_above_the_peak_is_refused():
    with pytest.raises(LitesparkError, match="dense fp8 peak"):
        figures(work(H100), Timing([0.5], 0.5, None))


def test_what_cannot_be_measured_is_null():
    on_cpu = figures(work("CPU"), Timing([2.5], 2.5, None))
    for key in ("tflops_per_gpu_causal", "mfu", "joules_per_1000_tokens", "watts_per_gpu"):
        assert on_cpu[key] is None
    unknown = figures(work("NVIDIA Unknown"), Timing([2.5], 2.5, None))
    assert unknown["mfu"] is None
    assert unknown["tflops_per_gpu_causal"] > 0


def options(*words: str):
    return parse(["bench", *words])


def test_options_become_a_configuration():
    config = bench.build_config(
        options("--model", "tiny", "--precision", "fp32", "--micro-batch", "2", "--steps", "7"), 1
    )
    assert config.model.num_layers == 4
    assert config.precision.mode == "fp32"
    assert config.data.sequence_length == 512, "the model's longest, which is below 4096"
    assert (config.batch.micro, config.batch.global_) == (2, 16)
    assert config.total_steps == 3 + 7 + 1
    default = bench.build_config(options(), 1)
    assert (default.model.preset, default.data.sequence_length) == ("paper-3b", 4096)
    assert (default.batch.micro, default.batch.global_) == (4, 32)


def test_the_global_batch_follows_the_replicas_and_overrides_win():
    words = ["--model", "tiny", "--accumulate", "3", "batch.micro=1", "parallel.tensor=2"]
    assert bench.build_config(options(*words), 8).batch.global_ == 3 * 4
    config = bench.build_config(options(*words, "batch.global=8", "model.num_layers=2"), 8)
    assert (config.batch.global_, config.model.num_layers) == (8, 2)


def test_data_is_read_where_it_is_named():
    config = bench.build_config(options("--model", "tiny", "--data", "a b/c: [d"), 1)
    assert [entry.prefix for entry in config.data.blend] == ["a b/c: [d"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tinny"], "Did you mean 'tiny'"),
        (["--precision", "fp4"], "precision.mode = 'fp4'"),
        (["model.num_layer=2"], "Did you mean 'num_layers'"),
    ],
)
def test_mistakes_are_named_in_the_configurations_words(words, message):
    with pytest.raises(UserError, match=message) as caught:
        bench.build_config(options(*words), 1)
    assert "litespark-bench-" not in str(caught.value), "the temporary file is none of the user's"


def test_numbers_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        options("--steps", "0")
    assert "0 is not 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "micro_batch", "expected"),
    [
        (["--precision", "bf16"], "2", ["--precision", "bf16"]),
        (["--precision", "bf16", "--peer-micro-batch", "4"], "4", ["--precision", "bf16"]),
        (["model.num_layers=3", "--no-profile"], "2", ["num_layers=3", "--no-profile"]),
    ],
)
def test_the_peer_gets_the_same_work(words, micro_batch, expected):
    args = options("--accumulate", "5", *words)
    command = bench_peer.peer_command(args, bench.build_config(args, 1))
    assert command[command.index("--micro-batch") + 1] == micro_batch
    assert command[command.index("--accumulate") + 1] == "5"
    assert command[command.index("--seq-length") + 1] == "4096"
    assert set(expected) <= set(command)
    assert "vocab_size=32000" in command


def test_the_peers_script_takes_the_command():
    """It parses its arguments before it needs a GPU, and knows the same presets."""
    from tools.benchmarks.common import model_of, peer_parser

    args = options("--model", "llama3.2-1b", "model.num_layers=2")
    command = bench_peer.peer_command(args, bench.build_config(args, 1))
    own = [word for word in command[2:] if word not in ("--precision", "bf16")]
    model = model_of(peer_parser(None).parse_args(own))
    assert (model.num_layers, model.hidden_size, model.tie_embeddings) == (2, 2048, True)
    shown = subprocess.run(
        [sys.executable, str(bench_peer.SCRIPT), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for word in [*command[2:], "--recipe", "--fp8-param", "--no-profile"]:
        assert not word.startswith("--") or word in shown


PEER = """
import json, os, sys
print("a library's chatter")
print(json.dumps({{"implementation": "peer", "path": os.environ.get("PYTHONPATH", ""), {extra}}}))
print("more of it")
sys.exit({code})
"""


@pytest.fixture
def peer_script(tmp_path, monkeypatch):
    def write(code: int = 0, extra: str = '"tokens_per_second": 50.0') -> None:
        (tmp_path / "peer.py").write_text(PEER.format(code=code, extra=extra))

    monkeypatch.setattr(bench_peer, "SCRIPT", tmp_path / "peer.py")
    monkeypatch.setattr("litespark.parallel.device.has_cuda", lambda: True)
    return write


def test_the_peer_runs_with_its_own_packages_in_front(peer_script, tmp_path):
    peer_script()
    args = options("--compare", "peer", "--peer-pythonpath", str(tmp_path))
    result = bench_peer.run_peer(args, bench.build_config(args, 1))
    assert result["path"].split(":")[0] == str(tmp_path)
    assert result["tokens_per_second"] == 50.0


def own_result(**other: object) -> dict:
    return {
        "implementation": "litespark",
        "model": "paper-3b",
        "parameters": 2.29e9,
        "precision": {"mode": "fp8", "recipe": "delayed"},
        "parallel": "TP1 x CP1 x DP1 x PP1",
        "sequence_length": 4096,
        "micro_batch": 4,
        "accumulate": 8,
        "tokens": "random",
        "warmup": 3,
        "device": H100,
        "gpus": 1,
        "loss": 10.4,
        "breakdown": None,
        **figures(work(H100), Timing([2.5], 2.5, None)),
    } | other


def test_both_are_printed_with_their_ratio(peer_script, monkeypatch, capsys, tmp_path):
    peer_script()
    monkeypatch.setattr(bench, "_measure", lambda *_: own_result(tokens_per_second=60.0))
    out = tmp_path / "out.json"
    code = bench.run(options("--compare", "peer", "--json", str(out)))
    assert code == ExitCode.DONE
    line = next(line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line)
    assert line.split() == ["tokens/s", "60", "50", "1.200"]
    written = json.loads(out.read_text())
    assert written["ratio_to_peer"] == pytest.approx(1.2)
    assert written["peer"]["tokens_per_second"] == 50.0


def test_a_peer_that_fails_costs_only_the_comparison(peer_script, monkeypatch, capsys, tmp_path):
    peer_script(code=3)
    monkeypatch.setattr(bench, "_measure", lambda *_: own_result())
    out = tmp_path / "out.json"
    with pytest.raises(LitesparkError, match="the peer failed"):
        bench.run(options("--compare", "peer", "--json", str(out)))
    assert "tokens/s" in capsys.readouterr().out
    assert "peer" not in json.loads(out.read_text())


def test_a_loss_that_is_not_finite_is_no_measurement(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_measure", lambda *_: own_result(loss=None))
    with pytest.raises(LitesparkError, match="not finite") as caught:
        bench.run(options())
    assert caught.value.exit_code == ExitCode.ENDED_BY_GUARD


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "no/such/folder/a.json"], "no folder that exists"),
        (["--compare", "peer", "--precision", "fp32"], "no configuration of the peer"),
        (["--compare", "peer", "--peer-pythonpath", "no/such"], "is no folder"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(words, message, monkeypatch):
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        bench.run(options(*words))


def test_the_table_shows_the_breakdown_and_what_was_not_measured():
    kernels = [Kernel("nvjet_tst", 0, 100), Kernel("rmsnorm_fwd", 100, 120)]
    ours = own_result(breakdown=break_down(kernels, 130e-6, 10))
    theirs = own_result(implementation="peer", breakdown=break_down(kernels[:1], 130e-6, 10))
    lines = result_table(ours | {"peer": theirs}).splitlines()
    words = [re.split(r"\s{2,}", line.strip()) for line in lines]
    rows = {label: values for label, *values in words}
    assert rows["matrix products"] == ["10.000", "10.000"]
    assert rows["norm"] == ["2.000", "-"]
    assert rows["idle"] == ["1.000", "3.000"]
    assert rows["J per 1000 tokens"] == ["-", "-", "-"]
    assert "nvjet_tst" in kernel_table(ours["breakdown"])


def test_ranks_count_as_the_slowest_and_energy_as_the_sum(monkeypatch):
    from litespark.metering import measurement

    def gathered(joules: float | None):
        timings = [Timing([1.0, 5.0], 6.5, 10.0), Timing([2.0, 3.0], 5.5, joules)]
        monkeypatch.setattr(measurement, "gather_objects", lambda _: timings)
        return measurement.over_ranks(timings[0])

    assert gathered(20.0) == Timing([2.0, 5.0], 6.5, 30.0)
    assert gathered(None).joules is None
    assert math.isclose(gathered(20.0).region_seconds, 6.5)


def kernel_cases() -> list[Any]:
    """Every case of tools/benchmarks/kernels.py at tiny shapes, on the CPU."""
    from tools.benchmarks.kernel_cases import CASES, Shapes

    shapes = Shapes(ModelConfig(preset="tiny"), s=16, b=2, device=torch.device("cpu"))  # type: ignore[call-arg]
    return [case for cases in CASES.values() for case in cases(shapes)]


def test_every_tunable_kernel_is_benchmarked_and_runs():
    """The references run here, the kernels on a GPU; both through the same calls."""
    cases = kernel_cases()
    for case in cases:
        case.run(None)
        assert case.bytes_moved > 0
    tunable = {
        f"{path.stem}.{key}"
        for path in (ROOT / "litespark" / "ops").glob("*.py")
        for key in getattr(importlib.import_module(f"litespark.ops.{path.stem}"), "CANDIDATES", ())
    }
    assert {case.kernel for case in cases} == tunable


def test_bytes_are_those_that_must_move():
    by_what = {(case.kernel, case.what): case.bytes_moved for case in kernel_cases()}
    tokens, hidden, ffn = 32, 128, 384
    # Two inputs and two outputs of bf16; g and u in, the activation out.
    assert by_what["rms_norm.forward", "sum, norm in bf16"] == 4 * 2 * tokens * hidden
    assert by_what["swiglu.forward", "to bf16"] == 3 * 2 * tokens * ffn
    # fp32 master, gradient and moments in; master, moments and a bf16 weight out.
    assert by_what["adamw.step", "FC1's weight"] == (16 + 14) * 2 * ffn * hidden
