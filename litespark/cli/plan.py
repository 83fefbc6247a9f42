"""`litespark plan`: the best layouts of a run on GPUs that nobody has asked for yet."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from litespark.cli.arguments import add_command, add_config_arguments
from litespark.errors import ExitCode, UserError

_DESCRIPTION = """\
Predict a run before it is paid for: memory of the fullest rank, time and energy of a step, for
every layout (tensor x pipeline x virtual pipeline x context x data, micro-batch, recomputation)
that the configuration's rules allow on so many GPUs.  Shows the best five, how the configuration
does as it is written, and why each of the others loses.  Needs no GPU.

Rates are those that one GPU reached in training (`litespark bench --calibrate`); messages between
GPUs are modelled, not measured.  Energy is the GPUs' alone.  docs/planner.md says how and how well.
"""

_EPILOG = """\
examples:
  litespark plan examples/pretrain/paper-3b.yaml --gpus 8 --gpu h200-sxm
  litespark plan examples/pretrain/paper-30b.yaml --gpus 256 --gpu h200-sxm --network efa \\
      --tokens 500e9
  litespark plan run.yaml --gpus 64 --gpu my-gpu.json --json plan.json batch.global=512

exit codes: 0 done, also when no layout fits; 2 the input is wrong; 1 anything else.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "plan",
        summary="memory, throughput, energy and the best layout of a run, without a GPU",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_config_arguments(parser)
    add = parser.add_argument
    add("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    add("--gpu", default="h100-sxm", metavar="KIND", help="h100-sxm, h200-sxm or a calibration")
    add("--nodes", type=int, metavar="N", help="machines (default: one for every 8 GPUs)")
    add(
        "--network",
        default="infiniband",
        help="between machines: infiniband or efa, 400 Gbit/s a GPU (default: infiniband)",
    )
    add(
        "--tokens",
        type=float,
        metavar="N",
        help="budget for days and MWh, e.g. 500e9 (default: the configuration's)",
    )
    add("--json", type=Path, metavar="FILE", help="write every layout, with all parts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print; returns the exit code."""
    from litespark.cli.plan_table import print_plans
    from litespark.config.load import load_config
    from litespark.config.validate import validate
    from litespark.metering.plan.calibration import load_calibration
    from litespark.metering.plan.communication import network_of
    from litespark.metering.plan.search import Cluster, Plan, search
    from litespark.utils.files import write_text_atomically

    config = load_config(args.config, args.overrides)
    if config.task == "dpo" or config.lora is not None:
        raise UserError(
            f"task = {config.task}" if config.task == "dpo" else "lora",
            "is not planned: reference models and adapters have no memory model yet",
            "Plan pre-training or full fine-tuning (task pretrain or sft, no lora).",
        )
    calibration = load_calibration(args.gpu)
    network = network_of(args.network, _gpus_per_node(args.gpus, args.nodes))
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}", "lies in no folder that exists", "Make it first.")
    if args.tokens is not None and not 0 < args.tokens < float("inf"):
        raise UserError(f"--tokens {args.tokens:g}", "is no budget", "Give a number above 0.")
    tokens = args.tokens or float(config.total_steps * config.tokens_per_step)
    cluster = Cluster(args.gpus, calibration, network)
    started = time.perf_counter()
    plans = search(config, cluster)
    seconds = time.perf_counter() - started
    if not plans:
        raise UserError(
            f"batch.global = {config.batch.global_}",
            f"cannot be divided over {args.gpus} GPUs by any layout",
            "Change batch.global, or --gpus.",
        )
    written = None if validate(config, args.gpus) else Plan(config, cluster)
    print_plans(plans, written, tokens, seconds)
    if args.json is not None:
        record = {
            "gpus": args.gpus,
            "gpu": calibration.gpu,
            "calibration": calibration.model_dump(mode="json"),
            "network": network.name,
            "gpus_per_node": network.gpus_per_node,
            "tokens": tokens,
            "as_written": None if written is None else written.as_record(tokens),
            "plans": [plan.as_record(tokens) for plan in plans],
        }
        write_text_atomically(args.json, json.dumps(record, indent=1) + "\n")
        sys.stdout.write(f"wrote {args.json}\n")
    return ExitCode.DONE


def _gpus_per_node(gpus: int, nodes: int | None) -> int:
    if gpus < 1:
        raise UserError(f"--gpus {gpus}", "is not 1 or more", "Say how many GPUs there are.")
    if nodes is None:
        return min(8, gpus)
    if nodes < 1 or gpus % nodes:
        raise UserError(
            f"--nodes {nodes}", f"does not divide --gpus {gpus}", "Give a divisor of it."
        )
    return gpus // nodes
