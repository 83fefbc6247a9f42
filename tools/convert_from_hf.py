"""`litespark import` under the flag names that users of Megatron-LM and Megatron-Bridge know.

    python tools/convert_from_hf.py --load models/Llama-3.2-1B --save imported/llama --verify
    python tools/convert_from_hf.py --loader megatron --load checkpoints/llama --save imported/llama

The checkpoint that is written loads at any parallel layout; so the flags by which other tools are
told of layouts and formats have no effect and are named when they are given.

The litespark package must be installed, as `make install` does into .venv: activate that, or start
the tool with .venv/bin/python.
"""

from __future__ import annotations

import argparse
import sys

from litespark.cli import import_
from litespark.cli.exits import run_command
from litespark.cli.megatron_flags import add_ignored_flags, tell_ignored
from litespark.utils.log import quiet_upstream, set_up_logging


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--load",
        "--load-dir",
        "--hf-path",
        dest="source",
        required=True,
        metavar="DIR",
        help="a Hugging Face folder; with --loader megatron, the folder of torch_dist checkpoints",
    )
    parser.add_argument(
        "--save",
        "--save-dir",
        "--megatron-path",
        dest="out_checkpoint",
        required=True,
        metavar="DIR",
        help="folder to make; it must not exist, or be empty",
    )
    import_.add_import_options(parser)
    add_ignored_flags(parser)
    return parser


def main() -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args()
    quiet_upstream()
    set_up_logging(is_first_rank=True)
    if args.loader in ("megatron", "mcore", "core"):
        args.kind = "megatron"
        args.loader = None
    tell_ignored(args)
    return run_command(lambda: import_.run(args))


if __name__ == "__main__":
    sys.exit(main())
