"""What a shard holds, from its index and its manifest alone: its tokens are not read.

Lengths are counted by value, and there are far fewer different lengths than documents, so exact
percentiles of any number of documents need little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from litespark.data.index_file import unreadable_shard
from litespark.data.manifest import manifest_path
from litespark.data.verify import open_shard
from litespark.errors import UserError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True, eq=False)
class LengthCounts:
    """How often each document length occurs: `lengths_tokens` [n] ascending, `counts` [n] int64."""

    lengths_tokens: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @property
    def documents(self) -> int:
        """Documents, the empty ones included."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths_tokens @ self.counts)

    @property
    def empty_documents(self) -> int:
        """Documents without a token."""
        return int(self.counts[self.lengths_tokens == 0].sum())

    def percentile_tokens(self, percent: float) -> int:
        """Return the smallest length that `percent` % of the documents do not exceed."""
        ends = np.cumsum(self.counts)
        place = int(np.searchsorted(ends, percent / 100 * ends[-1], side="left"))
        return int(self.lengths_tokens[min(place, len(ends) - 1)])

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (first, last, documents) of 0, 1, 2-3, 4-7, ... tokens, up to the longest.

        Bins before the first document are left out.
        """
        # frexp is exact: 2^(e-1) <= length < 2^e, and e = 0 for no token.
        bins = np.frexp(self.lengths_tokens.astype(np.float64))[1]
        documents = np.bincount(bins, weights=self.counts)
        return [
            (1 << e >> 1, max(0, (1 << e) - 1), int(documents[e]))
            for e in range(int(bins.min()), len(documents))
        ]


def count_lengths(blocks: Iterable[npt.NDArray[np.int64]]) -> LengthCounts:
    """Count the lengths of documents given as arrays of int64."""
    nothing = np.zeros(0, dtype=np.int64)
    total = LengthCounts(nothing, nothing)
    for block in blocks:
        total = add_counts([total, LengthCounts(*np.unique(block, return_counts=True))])
    return total


def add_counts(parts: Sequence[LengthCounts]) -> LengthCounts:
    """Return the counts of several shards together."""
    merged, place = np.unique(
        np.concatenate([part.lengths_tokens for part in parts]), return_inverse=True
    )
    summed = np.zeros(len(merged), dtype=np.int64)
    np.add.at(summed, place, np.concatenate([part.counts for part in parts]))
    return LengthCounts(merged, summed)


@dataclass(frozen=True)
class SourceTokens:
    """What one input file gave."""

    name: str
    documents: int
    tokens: int


@dataclass(frozen=True, eq=False)
class ShardStatistics:
    """A shard's counts; `tokenizer` and `sources` are empty without a manifest."""

    prefix: str
    token_type: str
    bin_bytes: int
    lengths: LengthCounts
    tokenizer: str
    sources: tuple[SourceTokens, ...]


def shard_statistics(prefix: str) -> ShardStatistics:
    """Count what a shard holds, by document length and by source.

    Raises:
        UserError: when a file of the shard is missing, cannot be read or is damaged.
    """
    try:
        index, manifest = open_shard(prefix)
    except OSError as error:
        raise unreadable_shard(prefix, error) from error
    if index.documents == 0:
        raise UserError(f"{prefix}.idx", "describes no document", "Name a shard with documents.")
    sources, first = [], 0
    for source in manifest.sources if manifest is not None else ():
        last = first + source.documents
        if not first <= last <= index.documents:
            raise UserError(
                str(manifest_path(prefix)),
                f"gives its sources other documents than the {index.documents:,} that there are",
                "Copy the file again, or remove it to do without the sources.",
            )
        tokens = index.token_start(last) - index.token_start(first)
        sources.append(SourceTokens(source.name, source.documents, tokens))
        first = last
    tokenizer = ""
    if manifest is not None:
        record = manifest.tokenizer
        tokenizer = f"{record.name}, {record.vocab_size:,} ids, SHA-256 {record.identity[:12]}"
    return ShardStatistics(
        prefix,
        index.dtype.name,
        index.bin_bytes,
        count_lengths(index.document_lengths()),
        tokenizer,
        tuple(sources),
    )
