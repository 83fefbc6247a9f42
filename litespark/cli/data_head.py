"""`litespark data head`: documents of a shard as text."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_command
from litespark.errors import UserError

if TYPE_CHECKING:  # the help must not wait for numpy
    from litespark.data.indexed import IndexedReader
    from litespark.data.tokenizers import Tokenizer

# What a terminal takes for a command; a document is only to be looked at.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_DESCRIPTION = """\
Print documents of a shard as text, decoded with the tokenizer that made them.

A tokenizer other than the one named in the manifest is refused: it would give text, but not the
document's.  Control characters in a document are printed as \\x1b and the like.
"""

_EPILOG = """\
examples:
  litespark data head data/corpus_text_document --tokenizer data/tokenizer
  litespark data head data/corpus_text_document --tokenizer data/tokenizer --document 1200 --count 3

exit codes: 0 done, 2 the shard, the tokenizer or the document's number is wrong.
"""


def add_head_parser(actions: Any) -> None:
    """Add the parser of `head` to those of `litespark data`."""
    parser = add_command(
        actions,
        "head",
        summary="print documents as text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("prefix", metavar="PREFIX", help="path of the shard without .bin and .idx")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_MODEL",
        help="a folder with tokenizer.json or tokenizer.model, or such a file",
    )
    parser.add_argument(
        "--document",
        type=int,
        default=0,
        metavar="N",
        help="the first to print, counted from 0 (default: 0)",
    )
    parser.add_argument(
        "--count", type=int, default=1, metavar="K", help="how many to print (default: 1)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1000,
        metavar="T",
        help="print at most the first T tokens of each (default: 1000)",
    )
    parser.set_defaults(run=run_head)


def run_head(args: argparse.Namespace) -> int:
    """Print the documents asked for; return 0.

    Raises:
        UserError: when the shard or the tokenizer is wrong, or there is no such document.
    """
    from litespark.data.indexed import IndexedReader, unreadable_shard
    from litespark.data.manifest import read_manifest
    from litespark.data.tokenizers import load_tokenizer

    for option, value in (("--count", args.count), ("--max-tokens", args.max_tokens)):
        if value < 1:
            raise UserError(f"{option} {value}", "is below 1", "Give 1 or more.")
    try:
        reader = IndexedReader(args.prefix)
        manifest = read_manifest(args.prefix)
    except OSError as error:
        raise unreadable_shard(args.prefix, error) from error
    if not 0 <= args.document < reader.documents:
        raise UserError(
            f"--document {args.document}",
            f"is not among the {reader.documents:,} documents of {args.prefix}",
            f"Give a number from 0 to {reader.documents - 1}.",
        )
    tokenizer = load_tokenizer(args.tokenizer)
    if manifest is not None and manifest.tokenizer.identity != tokenizer.identity:
        raise UserError(
            f"--tokenizer {args.tokenizer}",
            f"has the SHA-256 {tokenizer.identity[:12]}, and {args.prefix} was written with "
            f"{manifest.tokenizer.name} of {manifest.tokenizer.identity[:12]}",
            "Name the tokenizer that wrote the shard.",
        )
    for document in range(args.document, min(args.document + args.count, reader.documents)):
        sys.stdout.write(_shown(reader, document, tokenizer, args.max_tokens))
    return 0


def _shown(reader: IndexedReader, document: int, tokenizer: Tokenizer, max_tokens: int) -> str:
    ids = reader.read(document).tolist()
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise UserError(
            f"document {document} of {reader.prefix}",
            f"holds token ids from {min(ids):,} to {max(ids):,}, the tokenizer has "
            f"{tokenizer.vocab_size:,}",
            "Name the tokenizer that wrote the shard.",
        )
    title = f"document {document:,}: {len(ids):,} tokens"
    if ids and ids[-1] == tokenizer.eos_id:
        title += ", the last is the end-of-text token"
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", tokenizer.decode(ids[:max_tokens]))
    hidden = len(ids) - max_tokens
    rest = f"\n[{hidden:,} more tokens]" if hidden > 0 else ""
    return f"--- {title}\n{text}{rest}\n"
