"""`litespark report`: one HTML page about a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from litespark.cli.arguments import add_command

_DESCRIPTION = """\
Write one HTML page about a run: its figures, its curves, its layout and its configuration.

The page needs nothing but itself, so it can be mailed or kept.  It can be written while the run is
still going on.  A value that was not measured is shown as such.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "report",
        summary="one HTML page with the figures and curves of a run",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run's output_dir, with its metrics.jsonl"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OTHER_RUN",
        help="another run's output_dir, drawn into the same charts",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write (default: RUN_DIR/report.html)"
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="DIR",
        help="also write every chart as a PNG file into this folder; needs litespark[plot]",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path; return 0.

    Raises:
        UserError: see `litespark.metering.report.write_report`.
    """
    from litespark.metering.report import write_report

    sys.stdout.write(f"wrote {write_report(args.run_dir, args.compare, args.output, args.png)}\n")
    return 0
