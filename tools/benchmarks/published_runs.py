"""The planner against runs that others have published: tokens/s a GPU, predicted and reported.

    python -m tools.benchmarks.published_runs                  # prints the table
    python -m tools.benchmarks.published_runs --write          # and keeps it, docs/planner.md

The runs are of other stacks, so they are predicted with a calibration of Megatron-Core with
Transformer Engine, from our own measurements of it at one shape on one H100; messages, bubbles and
larger shapes are the planner's model.  Nothing is fitted to the runs themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litespark.config.schema import RunConfig
from litespark.metering.plan.calibration import Calibration
from litespark.metering.plan.communication import NETWORKS, gather_seconds
from litespark.metering.plan.fit import Subject, fit
from litespark.metering.plan.parameters import model_elements
from litespark.metering.plan.time import step_time
from tools.benchmarks.calibrations import RESULTS, built_in, records_of

TABLE = RESULTS / "plan_published.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "planner.md"
BEGIN, END = "<!-- published runs: begin -->", "<!-- published runs: end -->"

# Current scaling against delayed, all else equal, both measured by us with FP8 weights on one H100
# (46,747 and 48,859 tokens/s of paper-3b): what it costs between the products.
_CURRENT_SCALING = 5.91 / (5.91 + 1e6 / 46_747 - 1e6 / 48_859)
_LLAMA2, _LLAMA3 = 4096, 8192
_MPT_30B = {
    "num_layers": 48,
    "hidden_size": 7168,
    "ffn_hidden_size": 19115,  # two matrices of 4 h are three of 8/3 h
    "num_attention_heads": 64,
    "head_dim": 112,
    "vocab_size": 50368,
    "max_sequence_length": 2048,
}


@dataclass(frozen=True)
class Published:
    """One run as its source gives it; `fsdp`: weights are gathered for each micro-batch."""

    source: str
    model: str
    sequence: int
    gpus: int
    precision: str
    tokens_per_second_per_gpu: float
    global_batch: int
    micro: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    recompute: str = "none"
    fsdp: bool = False
    current_scaling: bool = False
    assumed: str = ""


_DGXC = "NVIDIA dgxc-benchmarking v25.02"
_NEMO = "NeMo 24.12 performance summary"
_MOSAIC = "MosaicML llm-foundry benchmarks"
_MAXTEXT = "dgxc v25.02, MaxText"
_GBS = "global batch 2 a GPU"

RUNS = (
    Published(_DGXC, "llama3-8b", _LLAMA3, 8, "bf16", 10_254, 128, context=2),
    Published(_DGXC, "llama3-8b", _LLAMA3, 8, "fp8", 13_882, 128, context=2),
    Published(
        *("Megatron-Bridge 25.11", "llama3-8b", _LLAMA3, 8, "fp8", 14_451, 128),
        fsdp=True,
        current_scaling=True,
    ),
    Published(
        *(_DGXC, "llama3-70b", _LLAMA3, 64, "bf16", 1_121, 128),
        tensor=4,
        pipeline=4,
        virtual=5,
        context=2,
        assumed=_GBS,
    ),
    Published(
        *(_DGXC, "llama3-70b", _LLAMA3, 64, "fp8", 1_567, 128),
        tensor=4,
        pipeline=4,
        virtual=5,
        context=2,
        assumed=_GBS,
    ),
    Published(
        *("Megatron-Bridge 26.04", "llama3-70b", _LLAMA3, 64, "fp8", 1_664, 256),
        tensor=4,
        pipeline=8,
        virtual=5,
        current_scaling=True,
    ),
    Published(
        *(_MAXTEXT, "llama3-70b", _LLAMA3, 128, "bf16", 1_053, 256),
        micro=2,
        fsdp=True,
        assumed="no recomputation; one micro-batch",
    ),
    Published(
        *(_MAXTEXT, "llama3-70b", _LLAMA3, 128, "fp8", 1_806, 256),
        micro=2,
        fsdp=True,
        assumed="no recomputation; one micro-batch",
    ),
    Published(_NEMO, "llama2-7b", _LLAMA2, 8, "fp8", 16_934, 128),
    Published(_NEMO, "llama2-13b", _LLAMA2, 16, "fp8", 8_715, 128, pipeline=4, virtual=10),
    Published(
        *("NeMo 24.12 performance summary", "llama3-70b", _LLAMA2, 64, "fp8", 1_728, 128),
        tensor=4,
        pipeline=4,
        virtual=20,
        assumed="Llama 3's shape for Llama 2 70B, vocabulary 32,000",
    ),
    *(
        Published(
            *(_MOSAIC, "mpt-30b", 2048, gpus, "bf16", rate, 8 * gpus),
            micro=8,
            recompute="full",
            fsdp=True,
            assumed="a Llama of as many parameters; one micro-batch",
        )
        for gpus, rate in ((128, 2_199), (256, 2_148), (512, 2_115))
    ),
)


def peer_calibration() -> Calibration:
    """Megatron-Core with Transformer Engine on one H100, from our measurements of it."""
    names = ["h100-paper-3b-bf16", "h100-paper-3b-fp8-delayed-fastest-s2048"]
    names.append("h100-paper-3b-fp8-delayed-fastest-s16384")
    ours = built_in()["h100-sxm"]
    breakdown = records_of(["h100-paper-3b-fp8-delayed-peer-breakdown"])
    subject = Subject(
        gpu="h100-sxm",
        memory_gib=ours.memory_gib,
        copy_bytes_per_second=ours.copy_bytes_per_second,
        source="Megatron-Core 0.19 + Transformer Engine 2.20, one H100",
        stack="megatron-core + TE",
        product_tflops={"bf16": ours.product_tflops["bf16"]},  # cuBLAS computes them in both
    )
    return fit([*breakdown, *(record["peer"] for record in records_of(names))], subject)


def config_of_run(run: Published) -> RunConfig:
    """The published run as a configuration of ours."""
    shape: dict[str, Any] = _MPT_30B if run.model == "mpt-30b" else {"preset": run.model}
    vocabulary = {"vocab_size": 32000} if "32,000" in run.assumed else {}
    several = run.gpus > run.tensor * run.pipeline
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "not-written"},
            "model": {**shape, **vocabulary, "attention": "cudnn", "backend": "triton"},
            "parallel": {
                "tensor": run.tensor,
                "pipeline": run.pipeline,
                "virtual_pipeline": run.virtual,
                "context": run.context,
                "sequence": run.tensor > 1,
                "overlap_grad_reduce": several,
                "overlap_param_gather": several,
            },
            "data": {"blend": [{"prefix": "x"}], "sequence_length": run.sequence},
            "batch": {"micro": run.micro, "global": run.global_batch},
            "precision": {"mode": run.precision},
            "optimizer": {"lr": 1e-4},
            "training": {"steps": 1, "recompute": run.recompute},
        }
    )


def predict(run: Published, calibration: Calibration) -> float:
    """Tokens a second and GPU."""
    config = config_of_run(run)
    if run.current_scaling:
        shares = dict(calibration.memory_share)
        shares["fp8"] *= _CURRENT_SCALING
        calibration = calibration.model_copy(update={"memory_share": shares})
    step = step_time(config, run.gpus, calibration, NETWORKS["infiniband"])
    seconds = step.total
    if run.fsdp:
        seconds += _gathering_seconds(config, run, step.total - step.data) - step.data
    return config.tokens_per_step / seconds / run.gpus


def _gathering_seconds(config: RunConfig, run: Published, computing: float) -> float:
    """Weights gathered for both passes of each micro-batch and gradients scattered after it,
    beside the computation, which they slow down by a seventh of their time as elsewhere."""
    network = NETWORKS["infiniband"]
    elements = model_elements(config, run.gpus, 0).parameters
    count = config.num_micro_batches(run.gpus) or 1
    gathers = 2 * count * gather_seconds(2.0 * elements, run.gpus, 1, network)
    scatters = count * gather_seconds(4.0 * elements, run.gpus, 1, network)
    beside = min(gathers + scatters, 0.9 * computing)
    return gathers + scatters - beside + 0.15 * beside


def rows() -> list[dict[str, Any]]:
    """Every run with its prediction and the difference in percent of what was published."""
    calibration = peer_calibration()
    found = []
    for run in RUNS:
        predicted = predict(run, calibration)
        off = 100 * (predicted / run.tokens_per_second_per_gpu - 1)
        found.append({**asdict(run), "predicted": predicted, "percent_off": off})
    return found


def median_error(found: list[dict[str, Any]]) -> float:
    """Median of the absolute differences, in percent."""
    return statistics.median(abs(row["percent_off"]) for row in found)


def markdown(found: list[dict[str, Any]]) -> str:
    """The table for the documentation."""
    lines = [
        "| source | model, sequence | GPUs | format | layout | published | predicted | off |",
        "|---|---|--:|---|---|--:|--:|--:|",
    ]
    for row in found:
        layout = "FSDP" if row["fsdp"] else f"TP{row['tensor']} PP{row['pipeline']}"
        layout += f" VPP{row['virtual']}" if row["virtual"] > 1 else ""
        layout += f" CP{row['context']}" if row["context"] > 1 else ""
        layout += f", micro {row['micro']}"
        layout += ", full recompute" if row["recompute"] == "full" else ""
        layout += f" ({row['assumed']})" if row["assumed"] else ""
        lines.append(
            f"| {row['source']} | {row['model']}, {row['sequence']} | {row['gpus']} | "
            f"{row['precision']} | {layout} | {row['tokens_per_second_per_gpu']:,.0f} | "
            f"{row['predicted']:,.0f} | {row['percent_off']:+.1f} % |"
        )
    lines.append("")
    lines.append(f"Median of the absolute differences: {median_error(found):.1f} %.")
    return "\n".join(lines)


def main() -> int:
    """Print, and with --write keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="the JSON and the table in the docs")
    args = parser.parse_args()
    found = rows()
    table = markdown(found)
    print(table)
    if args.write:
        TABLE.write_text(json.dumps(found, indent=1) + "\n")
        text = DOCUMENT.read_text()
        head, rest = text.split(BEGIN)
        DOCUMENT.write_text(head + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
