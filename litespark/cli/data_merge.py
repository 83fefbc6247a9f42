"""`litespark data merge`: several shards to one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from litespark.cli.arguments import add_command
from litespark.cli.exits import unwind_on_sigterm
from litespark.cli.progress import byte_bar

_DESCRIPTION = """\
Join shards into one, byte for byte what one `litespark preprocess` over all their inputs, in this
order, would have written.

All must have been written with one tokenizer.  Each is checked on the way, so a damaged shard is
refused and not copied.  The manifest of the result lists the sources of all; if an input has none,
as those of Megatron-LM, the result has none.  The files appear whole when the job ends, or not at
all; memory does not grow with the shards.
"""

_EPILOG = """\
example:
  litespark data merge --input data/chunk1_text_document data/chunk2_text_document \\
      --output-prefix data/all_text_document

exit codes: 0 done, 2 a shard is missing or damaged, two do not go together, or the output cannot be
made or is there already, 1 anything else (disk full).
"""


def add_merge_parser(actions: Any) -> None:
    """Add the parser of `merge` to those of `litespark data`."""
    parser = add_command(
        actions,
        "merge",
        summary="join shards into one",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PREFIX",
        help="shards, without .bin and .idx, in the order in which they are joined",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="path of the new shard, without .bin and .idx; its folder is made",
    )
    parser.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> int:
    """Run the command; return its exit code.

    Raises:
        LitesparkError: see `litespark.data.merge.merge_shards`.
    """
    return merge(args.input, args.output_prefix)


def merge(prefixes: Sequence[str], output_prefix: str) -> int:
    """Join the shards with a progress bar on a terminal and a summary at the end; return 0.

    Raises:
        LitesparkError: see `litespark.data.merge.merge_shards`.
    """
    from litespark.data.merge import merge_shards

    unwind_on_sigterm()
    with byte_bar("merging") as bar:
        merged = merge_shards(prefixes, output_prefix, bar.begin, bar.advance)
    files = merged.files
    ending = ".bin, .idx, .json"
    if merged.manifest is None:
        ending = ".bin, .idx; no manifest, because an input has none"
    sys.stdout.write(
        f"wrote {output_prefix}{ending}\n"
        f"  documents  {files.documents:,} ({files.empty_documents:,} empty) "
        f"from {len(prefixes):,} shards\n"
        f"  tokens     {files.tokens:,} ({files.bin_bytes:,} bytes)\n"
    )
    return 0
