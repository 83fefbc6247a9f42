"""`litespark train`: train a model, or with --dry-run say what would be done."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from litespark.cli.arguments import add_command, add_config_arguments
from litespark.cli.launching import (
    add_launch_arguments,
    add_restarts_argument,
    check_restarts,
    launch_options,
    start,
)
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
  litespark train run.yaml --nproc 8 --nnodes 2 --rdzv-endpoint node0       (typed on both nodes)
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
    add_launch_arguments(parser)
    add_restarts_argument(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the resolved configuration and the layout, train nothing",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    how = launch_options(args)
    from litespark.training.launch import end_at_once_until_ready
    from litespark.training.preflight import preflight, remote_candidates

    end_at_once_until_ready()
    try:
        config = load_config(args.config, args.overrides)
    except UserError as error:
        error.on_every_rank = True  # every process of a launcher reads the same file
        raise
    if args.dry_run and os.environ.get("RANK", "0") != "0":
        return ExitCode.DONE  # the first rank speaks
    if args.dry_run or not how.is_rank:
        # Mistakes are found here, where they cost a second and one message. The ranks of a
        # launcher check for themselves, and agree on what they found.
        checked = preflight(config, how.world_size)
        remote = remote_candidates(config, checked.candidates)
        if args.dry_run:
            found = checked.checkpoint or next(iter(remote), None)
            return _show_plan(config, how.world_size, found)
        if how.starts_processes:
            check_restarts(config, how)
            folder = Path(config.run.output_dir)
            return start(how, ["train", args.config, *args.overrides], folder)
    from litespark.parallel.device import prepare_megatron

    prepare_megatron()  # before anything imports megatron-core
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
