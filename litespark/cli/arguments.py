"""Pieces that several commands' parsers share."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(
    subparsers: Any, name: str, *, summary: str, description: str, epilog: str = ""
) -> argparse.ArgumentParser:
    """Add a command whose help is printed as it is written.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returned.
        name: the word that users type.
        summary: one line for `litespark --help`.
        description: the first paragraphs of the command's own help.
        epilog: the last ones: examples and exit codes.
    """
    return subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation would change its meaning with the next option
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT; `litespark.checkpoint.folder.find_checkpoint` resolves it."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a step_... folder; of a run's folder or its checkpoints folder, the newest is taken",
    )
