"""`litespark train`: train a model, or with --dry-run say what would be done."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from litespark.cli.arguments import add_command, add_config_arguments
from litespark.config.load import dump_config, load_config
from litespark.config.schema import RunConfig
from litespark.errors import ExitCode, UserError
from litespark.parallel.layout import RankLayout

_DESCRIPTION = """\
Train a model.  The run's folder (run.output_dir) gets config.yaml, metrics.jsonl, events.jsonl,
tensorboard/ and checkpoints/.  Started again with the same command, a run resumes from its newest
checkpoint, also at another parallel layout.  SIGTERM, SIGUSR1 and Ctrl-C save and stop.
"""

_EPILOG = """\
examples:
  litespark train run.yaml
  litespark train run.yaml --nproc 4 parallel.tensor=2 parallel.pipeline=2
  litespark train run.yaml --nproc 8 --dry-run optimizer.lr=3e-4
  litespark train run.yaml --nproc 8 --max-restarts 3
  torchrun --nnodes 2 --nproc-per-node 8 ... -m litespark train run.yaml

exit codes: 0 done, 2 the configuration or the data is wrong, 3 stopped by a signal after saving,
4 ended by a guard (bad steps, hang), 1 anything else.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "train",
        summary="train a model from a YAML configuration",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="start N processes on this machine (default: one, in this process); under torchrun "
        "the processes are there already and --nproc is not given",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="with --nproc: after a fault (a lost rank, a hang) start again up to N times, from "
        "the newest checkpoint (default: 0); under torchrun give it torchrun's --max-restarts",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the resolved configuration and the layout, train nothing",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from litespark.parallel.environment import world_size_from_environment
    from litespark.training.launch import end_at_once_until_ready, launch
    from litespark.training.preflight import preflight, remote_candidates

    end_at_once_until_ready()
    try:
        config = load_config(args.config, args.overrides)
    except UserError as error:
        error.on_every_rank = True  # every process of a launcher reads the same file
        raise
    launched_world_size = world_size_from_environment()
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}", "is no number of processes", "Give 1 or more.")
    if args.nproc is not None and launched_world_size is not None:
        raise UserError(
            f"--nproc {args.nproc}",
            f"a launcher has started {launched_world_size} processes already (WORLD_SIZE is set)",
            "Leave out --nproc under torchrun.",
        )
    if args.max_restarts < 0 or (args.max_restarts and launched_world_size is not None):
        raise UserError(
            f"--max-restarts {args.max_restarts}",
            "is a number of restarts by this command, which starts the processes itself"
            if launched_world_size is None
            else "is for the launcher that has started this process",
            "Give 0 or more." if launched_world_size is None else "Give it to torchrun.",
        )
    if args.dry_run and os.environ.get("RANK", "0") != "0":
        return ExitCode.DONE  # the first rank speaks
    world_size = launched_world_size or args.nproc or 1
    if args.dry_run or launched_world_size is None:
        # Mistakes are found here, where they cost a second and one message. The ranks of a
        # launcher check for themselves, and agree on what they found.
        checked = preflight(config, world_size)
        remote = remote_candidates(config, checked.candidates)
        if args.dry_run:
            return _show_plan(config, world_size, checked.checkpoint or next(iter(remote), None))
        if world_size > 1 or args.max_restarts:
            return launch(
                world_size,
                ["train", args.config, *args.overrides],
                Path(config.run.output_dir),
                max_restarts=args.max_restarts,
            )
    from litespark.parallel.device import hide_gpu_packages

    hide_gpu_packages()  # before anything imports megatron-core
    from litespark.training.run import run_training

    run_training(config)
    return ExitCode.DONE


def _show_plan(config: RunConfig, world_size: int, checkpoint: Path | str | None) -> int:
    """Print the resolved configuration, who does what, and where the run would start."""
    layout = RankLayout.of(config.parallel, world_size)
    print(dump_config(config))  # noqa: T201
    print(f"{world_size} processes: {layout.describe()}")  # noqa: T201
    print("rank: tensor context data pipeline")  # noqa: T201
    for rank, place in layout.table():
        numbers = (place.tensor, place.context, place.data, place.pipeline)
        print(f"{rank:4d}: {numbers[0]:6d} {numbers[1]:7d} {numbers[2]:4d} {numbers[3]:8d}")  # noqa: T201
    print(  # noqa: T201
        f"{config.total_steps} steps of {config.tokens_per_step} tokens; "
        + (f"resumes from {checkpoint}" if checkpoint else "starts anew")
    )
    return ExitCode.DONE
