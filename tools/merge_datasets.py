"""`litespark data merge` under Megatron-LM's flag names, for scripts that know them.

    python tools/merge_datasets.py --input data/chunks --output-prefix data/all_text_document

Joins all shards (.bin with .idx) in a folder, in the order of their names.  The litespark package
must be installed, as `make install` does into .venv: activate that, or start the tool with
.venv/bin/python.
"""

from __future__ import annotations

import argparse
import sys

from litespark.cli.data_merge import merge
from litespark.cli.exits import run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="path of the new shard, without .bin and .idx",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Join the folder's shards; return 0.

    Raises:
        LitesparkError: see `litespark.data.merge.merge_shards`.
    """
    from litespark.data.merge import shards_in

    return merge(shards_in(args.input), args.output_prefix)


def main() -> int:
    """Run the tool on the command line's arguments; return its exit code."""
    args = build_parser().parse_args()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
