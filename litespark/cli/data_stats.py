"""`litespark data stats`: what shards hold, as a table, a picture of the lengths, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_command, add_shards_argument
from litespark.errors import UserError

if TYPE_CHECKING:  # the help must not wait for numpy
    from litespark.data.statistics import LengthCounts, ShardStatistics

_SOURCES_SHOWN = 20

_DESCRIPTION = """\
Tell what shards hold: documents, tokens, empty documents, the lengths of documents as percentiles
and as a picture, and the tokens of each source that the manifest names.

Only the indices are read, so this takes a second for ten million documents.  A percentile is the
smallest length that so many per cent of the documents do not exceed, the empty ones included.
"""

_EPILOG = """\
examples:
  litespark data stats data/corpus_text_document
  litespark data stats data/a_text_document data/b_text_document --png lengths.png
  litespark data stats data/corpus_text_document --json > stats.json

exit codes: 0 done, 2 a shard is missing or damaged, or the picture cannot be written.
"""


def add_stats_parser(actions: Any) -> None:
    """Add the parser of `stats` to those of `litespark data`."""
    parser = add_command(
        actions,
        "stats",
        summary="count documents and tokens, draw the lengths of documents",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_shards_argument(parser)
    parser.add_argument(
        "--png",
        metavar="FILE",
        help="also draw the lengths of all shards together into FILE; needs matplotlib, "
        "pip install 'litespark[plot]'",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with every source, and no text"
    )
    parser.set_defaults(run=run_stats)


def run_stats(args: argparse.Namespace) -> int:
    """Print the statistics of each shard, and of all together; return 0.

    Raises:
        UserError: when a shard is missing or damaged, or the picture cannot be written.
    """
    from litespark.data.length_chart import require_matplotlib, write_png
    from litespark.data.statistics import add_counts, shard_statistics

    if args.png is not None:
        require_matplotlib()
    shards = [shard_statistics(prefix) for prefix in args.prefixes]
    total = add_counts([shard.lengths for shard in shards])
    if args.json:
        value = {"shards": [_shard_as_json(shard) for shard in shards], "total": _as_json(total)}
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    else:
        for shard in shards:
            sys.stdout.write("\n".join(_shard_lines(shard)) + "\n")
        if len(shards) > 1:
            sys.stdout.write("\n".join([f"all {len(shards)} shards", *_count_lines(total)]) + "\n")
    if args.png is not None:
        try:
            write_png(total, args.png)
        except OSError as error:
            raise UserError(
                f"--png {args.png}",
                f"cannot be written ({error.strerror or error})",
                "Name a file in a folder that you may write to.",
            ) from error
    return 0


def _shard_lines(shard: ShardStatistics) -> list[str]:
    lines = [
        shard.prefix,
        f"  tokenizer   {_shown(shard.tokenizer) or 'not known: no manifest'}",
        f"  stored as   {shard.token_type}, {shard.bin_bytes:,} bytes",
        *_count_lines(shard.lengths),
    ]
    if shard.sources:
        lines.append(f"  tokens by source ({len(shard.sources):,} files)")
        ordered = sorted(shard.sources, key=lambda source: -source.tokens)
        width = max(len(f"{source.tokens:,}") for source in ordered)
        tokens = max(shard.lengths.tokens, 1)
        lines += [
            f"    {source.tokens:>{width},}  {source.tokens / tokens:6.1%}  {_shown(source.name)}"
            for source in ordered[:_SOURCES_SHOWN]
        ]
        if len(ordered) > _SOURCES_SHOWN:
            rest = sum(source.tokens for source in ordered[_SOURCES_SHOWN:])
            more = len(ordered) - _SOURCES_SHOWN
            lines.append(f"    {rest:>{width},}  {rest / tokens:6.1%}  {more:,} more (see --json)")
    return lines


def _count_lines(lengths: LengthCounts) -> list[str]:
    from litespark.data.length_chart import terminal_histogram
    from litespark.data.statistics import PERCENTILES

    empty = lengths.empty_documents
    percentiles = "  ".join(f"{p} %: {lengths.percentile_tokens(p):,}" for p in PERCENTILES)
    return [
        f"  documents   {lengths.documents:,} ({empty:,} empty)",
        f"  tokens      {lengths.tokens:,}",
        f"  length      mean {lengths.tokens / max(lengths.documents, 1):,.1f}, shortest "
        f"{int(lengths.lengths_tokens[0]):,}, longest {int(lengths.lengths_tokens[-1]):,} tokens",
        f"  percentiles {percentiles}",
        *(f"  {line}" for line in terminal_histogram(lengths, sys.stdout.encoding)),
    ]


def _shown(text: str) -> str:
    """A file's name may hold what no terminal shows, or what it takes for a command."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shard_as_json(shard: ShardStatistics) -> dict[str, Any]:
    return {
        "prefix": shard.prefix,
        "tokenizer": shard.tokenizer or None,
        "token_type": shard.token_type,
        "bin_bytes": shard.bin_bytes,
        **_as_json(shard.lengths),
        "sources": [vars(source) for source in shard.sources],
    }


def _as_json(lengths: LengthCounts) -> dict[str, Any]:
    from litespark.data.statistics import PERCENTILES

    return {
        "documents": lengths.documents,
        "empty_documents": lengths.empty_documents,
        "tokens": lengths.tokens,
        "shortest_tokens": int(lengths.lengths_tokens[0]),
        "longest_tokens": int(lengths.lengths_tokens[-1]),
        "percentiles_tokens": {str(p): lengths.percentile_tokens(p) for p in PERCENTILES},
        "histogram": [
            {"first_tokens": first, "last_tokens": last, "documents": documents}
            for first, last, documents in lengths.histogram()
        ],
    }
