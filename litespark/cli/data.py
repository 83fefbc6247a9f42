"""`litespark data`: checking shards that are there already, and preparing their sample index."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from litespark.cli.arguments import add_command
from litespark.cli.data_index import add_index_parser

_DESCRIPTION = """\
Look at indexed shards, those of `litespark preprocess` and of Megatron-LM, and index their samples.

A shard is named by its prefix: the path of its files without .bin and .idx.
"""

_VERIFY_DESCRIPTION = """\
Check that a shard is whole: its two files agree with each other, and with the sizes and SHA-256
checksums in its manifest.

All bytes are read, so that a bit flipped by a copy or a disk is found.  A shard of Megatron-LM has
no manifest; its index is checked all the same.
"""

_VERIFY_EPILOG = """\
example:
  litespark data verify data/corpus_text_document

exit codes: 0 nothing is wrong, 2 the shard is missing or damaged (the message names the file).
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "data",
        summary="check an indexed shard, index its samples",
        description=_DESCRIPTION,
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verify = add_command(
        actions,
        "verify",
        summary="check a shard's files and checksums",
        description=_VERIFY_DESCRIPTION,
        epilog=_VERIFY_EPILOG,
    )
    verify.add_argument("prefix", metavar="PREFIX", help="path of the shard without .bin and .idx")
    verify.set_defaults(run=run_verify)
    add_index_parser(actions)


def run_verify(args: argparse.Namespace) -> int:
    """Check one shard and print a line about it; return 0.

    Raises:
        UserError: when a file of the shard is missing, cannot be read or is damaged.
    """
    from litespark.data.indexed import IndexedReader, unreadable_shard
    from litespark.data.manifest import verify_checksums

    try:
        shard = IndexedReader(args.prefix)
    except OSError as error:
        raise unreadable_shard(args.prefix, error) from error
    checked = "checksums match"
    if verify_checksums(args.prefix) is None:
        checked = "no manifest, so no checksums to check"
    sys.stdout.write(
        f"{args.prefix}: {shard.documents:,} documents, {shard.tokens:,} tokens, {checked}\n"
    )
    return 0
