"""The `litespark` command: finds the subcommand and loads nothing that it does not need."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from litespark.cli.exits import run_command
from litespark.utils.log import quiet_upstream, set_up_logging
from litespark.version import __version__

COMMANDS = (
    *("preprocess", "data", "train", "export", "import", "generate", "report", "bench"),
    *("plan", "doctor"),
)


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with these subcommands; each is a module beside this one."""
    parser = argparse.ArgumentParser(
        prog="litespark",
        description="Pre-train Llama-like models with 3D parallelism, from a laptop's CPU to many "
        "GPU nodes: text to indexed shards, training, export to Hugging Face.",
        epilog="Exit codes: 0 done; 2 the input is wrong; 3 stopped by a signal after saving; "
        "4 ended by a guard (NaN); 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"litespark {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        module = "import_" if command == "import" else command  # a keyword
        import_module(f"litespark.cli.{module}").add_parser(subparsers)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `section.key=value` may stand before and after options."""
    if arguments is None:
        arguments = sys.argv[1:]
    # Some commands' options come from the configuration, which takes 0.1 s to load.
    named = [word for word in arguments[:1] if word in COMMANDS]
    parser = build_parser(named or COMMANDS)
    args, rest = parser.parse_known_args(arguments)
    # argparse gives a positional list only the words before the first option.
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides.extend(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse(arguments)
    quiet_upstream()
    set_up_logging(is_first_rank=os.environ.get("RANK", "0") == "0")
    return run_command(lambda: args.run(args))
