"""`litespark doctor`: what is installed, what is missing, what is slow, and what to type."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_command
from litespark.cli.launching import add_launch_arguments, launch_options, start
from litespark.errors import ExitCode, UserError

if TYPE_CHECKING:
    from litespark.metering.doctor.finding import Check, Finding

_DESCRIPTION = """\
Look at this machine: packages, GPUs and their driver, NVLink, NUMA, NCCL, EFA and InfiniBand,
power and clock caps, shared memory, limits, disk, clock, names.  Each finding is fine, a warning
or wrong, with what to type.

With --distributed, look at several processes and nodes together: who is there, who reaches whom,
whether code and packages are the same, clocks, an all-reduce, and the bandwidth between every two
ranks, which finds the slow node before training does.
"""

_EPILOG = """\
examples:
  litespark doctor
  litespark doctor --path /fsx --s3 s3://bucket/data/
  litespark doctor --distributed --nproc 8
  litespark doctor --distributed --nproc 8 --nnodes 2 --rdzv-endpoint node0     (on both nodes)
  srun --nodes 2 --ntasks-per-node 8 bash launch/slurm_task.sh litespark doctor --distributed

exit codes: 0 nothing is wrong (there may be warnings), 1 something is wrong, 2 wrong arguments.
"""

_MARKS = {"fine": "  ", "warning": "! ", "wrong": "X "}


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "doctor",
        summary="what is installed, missing or slow here, and between the nodes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--path",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder whose disk is measured, with a file of 128 MiB (default: this folder)",
    )
    parser.add_argument(
        "--s3", metavar="URL", help="an object, or a prefix with some, whose reading is measured"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a report")
    parser.add_argument(
        "--distributed", action="store_true", help="look at several processes together"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="with --distributed: how long each step may take (default: 60)",
    )
    add_launch_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    how = launch_options(args)
    if not args.distributed:
        if how.is_rank or how.starts_processes:
            raise UserError(
                "doctor", "looks at one machine without --distributed", "Give --distributed."
            )
        return _report(_local_findings(args), as_json=args.json)
    if not args.timeout > 0:
        raise UserError(
            f"--timeout {args.timeout:g}", "is no time to wait", "Give seconds above 0."
        )
    if not how.is_rank:
        words = ["doctor", "--distributed", "--timeout", str(args.timeout)]
        # Ranks write no events: the folder only has to be one where none are.
        return start(how, words + ["--json"] * args.json, Path(os.devnull))
    return _run_rank(args)


def _local_findings(args: argparse.Namespace) -> Iterable[Finding]:
    from litespark.metering.doctor import gpus, machine, software, stores
    from litespark.metering.doctor.finding import run_checks

    checks: list[tuple[str, Check]] = [
        ("packages", software.check_requirements),
        ("GPU packages", software.check_gpu_packages),
        ("variables", software.check_variables),
        ("GPUs", gpus.check_devices),
        ("GPU health", gpus.check_health),
        ("NVLink", gpus.check_links),
        ("NUMA", gpus.check_numa),
        ("cores", machine.check_cores),
        ("memory", machine.check_memory),
        ("limits", machine.check_limits),
        ("address", machine.check_names),
        ("fabric", machine.check_fabric),
        ("clock", machine.check_clock),
        ("disk", partial(machine.check_disk, args.path)),
    ]
    if args.s3 is not None:
        checks.append(("S3", partial(stores.check_store, args.s3)))
    return run_checks(checks)


def _run_rank(args: argparse.Namespace) -> int:
    """This rank's part of the examination; the first one speaks."""
    from litespark.metering.doctor.examination import examine

    findings, lines = examine(args.timeout)
    is_first = os.environ["RANK"] == "0"
    code = _report(findings, as_json=args.json, is_shown=is_first)
    if lines and is_first and not args.json:
        sys.stdout.write("\nGB/s from the row's rank to the column's:\n" + "\n".join(lines) + "\n")
    return code


def _report(findings: Iterable[Finding], *, as_json: bool, is_shown: bool = True) -> int:
    """Print findings as they come; returns 1 if one is wrong."""
    found = []
    for finding in findings:
        found.append(finding)
        if is_shown and not as_json:
            fix = f"\n{'':26}-> {finding.fix}" if finding.fix else ""
            sys.stdout.write(f"{_MARKS[finding.status]}{finding.name:<24}{finding.seen}{fix}\n")
            sys.stdout.flush()
    counts = {status: sum(f.status == status for f in found) for status in _MARKS}
    if is_shown and as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=1) + "\n")
    elif is_shown:
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        sys.stdout.write(f"{summary}\n")
    return ExitCode.FAILED if counts["wrong"] else ExitCode.DONE
