"""Pieces that several commands' parsers share."""

from __future__ import annotations

import argparse
from pathlib import Path
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


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and the overrides; `litespark.config.load.load_config` reads both."""
    parser.add_argument("config", metavar="CONFIG", help="the run's YAML file, see examples/")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="values that replace the file's, e.g. optimizer.lr=3e-4",
    )


def add_shards_argument(parser: argparse.ArgumentParser) -> None:
    """Add PREFIX..., the shards that a command works on one after the other."""
    parser.add_argument(
        "prefixes", nargs="+", metavar="PREFIX", help="path of a shard without .bin and .idx"
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT and --no-verify; `open_checkpoint` resolves them."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a step_... folder; of a run's folder or its checkpoints folder, the newest is taken",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare the checkpoint's files with their checksums first, which reads all "
        "of it, the optimizer's state included",
    )


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --verify and --verify-text, of the commands that exchange with Hugging Face."""
    parser.add_argument(
        "--verify",
        action="store_true",
        help="then run text through both models, Litespark's and transformers' (extra hf), and "
        "compare logits and loss; the result is verification.json beside the weights, and "
        "another model is an error. Models beyond 4 GiB go layer by layer",
    )
    parser.add_argument(
        "--verify-text",
        metavar="FILE",
        help="text for --verify, of which the first 256 tokens are taken (default: English from "
        "Python's documentation)",
    )


def open_checkpoint(args: argparse.Namespace) -> Path:
    """The checkpoint that the arguments name, whole.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from litespark.checkpoint.folder import find_checkpoint
    from litespark.checkpoint.integrity import check_whole

    checkpoint = find_checkpoint(args.checkpoint)
    if not args.no_verify:
        check_whole(checkpoint)
    return checkpoint
