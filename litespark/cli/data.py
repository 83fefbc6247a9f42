"""`litespark data`: looks at shards that are there, joins them, indexes their samples."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from litespark.cli.arguments import add_command, add_shards_argument
from litespark.cli.data_copy import add_copy_parser
from litespark.cli.data_head import add_head_parser
from litespark.cli.data_index import add_index_parser
from litespark.cli.data_merge import add_merge_parser
from litespark.cli.data_stats import add_stats_parser
from litespark.cli.progress import byte_bar
from litespark.errors import UserError, raise_user_errors

_DESCRIPTION = """\
Look at indexed shards, those of `litespark preprocess` and of Megatron-LM, join them, and index
their samples.

A shard is named by its prefix: the path of its files without .bin and .idx.
"""

_VERIFY_DESCRIPTION = """\
Check that shards are whole: the two files of each agree with each other, with the sizes and SHA-256
checksums in its manifest, and no token id reaches the size of its tokenizer's vocabulary.

All bytes are read, so that a bit flipped by a copy or a disk is found.  A shard of Megatron-LM has
no manifest; its index is checked all the same, and its ids if --vocab-size is given.
"""

_VERIFY_EPILOG = """\
examples:
  litespark data verify data/corpus_text_document
  litespark data verify data/a_text_document data/b_text_document
  litespark data verify megatron/c4_text_document --vocab-size 32000

exit codes: 0 nothing is wrong, 2 a shard is missing or damaged (the message names the file; the
shards after it are checked too).
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "data",
        summary="check, describe, read, join and index shards",
        description=_DESCRIPTION,
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verify = add_command(
        actions,
        "verify",
        summary="check the files, checksums and token ids of shards",
        description=_VERIFY_DESCRIPTION,
        epilog=_VERIFY_EPILOG,
    )
    add_shards_argument(verify)
    verify.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="refuse token ids of N and above (default: the vocabulary that the manifest names)",
    )
    verify.set_defaults(run=run_verify)
    add_stats_parser(actions)
    add_head_parser(actions)
    add_merge_parser(actions)
    add_copy_parser(actions)
    add_index_parser(actions)


def run_verify(args: argparse.Namespace) -> int:
    """Check each shard and print a line about those that are whole; return 0.

    Raises:
        UserError: when a file of a shard is missing, cannot be read or is damaged.
    """
    from litespark.data.indexed import bin_path
    from litespark.data.verify import verify_shard

    if args.vocab_size is not None and args.vocab_size < 1:
        raise UserError(f"--vocab-size {args.vocab_size}", "is below 1", "Give the tokenizer's.")
    errors = []
    with byte_bar("verifying") as bar:
        for number, prefix in enumerate(args.prefixes, start=1):
            bar.rename(f"{number}/{len(args.prefixes)} {prefix}")
            try:
                bar.begin(bin_path(prefix).stat().st_size if bin_path(prefix).is_file() else 0)
                shard = verify_shard(prefix, args.vocab_size, bar.advance)
            except UserError as error:
                errors.append(error)
                continue
            if shard.tokens == 0:
                errors.append(
                    UserError(
                        str(bin_path(prefix)), "the shard holds no tokens", "Use one with text."
                    )
                )
                continue
            checked = "checksums match"
            if shard.manifest is None:
                checked = "no manifest, so no checksums to check"
            if shard.vocab_size is not None:
                checked += f", ids below {shard.vocab_size:,}"
            sys.stdout.write(
                f"{prefix}: {shard.documents:,} documents, {shard.tokens:,} tokens, {checked}\n"
            )
    raise_user_errors(errors)
    return 0
