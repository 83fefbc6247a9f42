"""`litespark export` under the flag names that users of Megatron-LM and Megatron-Bridge know.

    python tools/convert_to_hf.py --load runs/paper-3b --save exported/paper-3b \\
        --tokenizer-model data/tokenizer --verify

`--load` takes a run's folder, its checkpoints folder or one checkpoint, at whatever parallel layout
it was written; so the flags by which other tools are told of layouts and formats have no effect and
are named when they are given.

The litespark package must be installed, as `make install` does into .venv: activate that, or start
the tool with .venv/bin/python.
"""

from __future__ import annotations

import argparse
import sys

from litespark.cli import export
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
        "--megatron-path",
        dest="checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder, its checkpoints folder, or a step_... folder",
    )
    parser.add_argument(
        "--save",
        "--save-dir",
        "--hf-path",
        dest="out_dir",
        required=True,
        metavar="DIR",
        help="folder to make; it must not exist, or be empty",
    )
    parser.add_argument(
        "--tokenizer-model", dest="tokenizer", metavar="PATH", help="the same as --tokenizer"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the checkpoint's checksums first"
    )
    export.add_export_options(parser)
    add_ignored_flags(parser)
    return parser


def main() -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args()
    quiet_upstream()
    set_up_logging(is_first_rank=True)
    tell_ignored(args)
    return run_command(lambda: export.run(args))


if __name__ == "__main__":
    sys.exit(main())
