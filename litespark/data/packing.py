"""Whole items into bins of one size: which documents share a sample.

Best-fit decreasing: items go into bins from the longest to the shortest, each into the bin that it
fills best.  For text it leaves about one place in ten thousand empty (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830), and it can be done without a step for
each item.  All items of one length L are placed together, as counts: the best bin for the first
has the least room r that is enough, and stays the best for the next ones until r mod L is left, so
that every bin with room r takes r // L of them before any with more room takes one.  What has to be
known of a bin is its room alone, and a room is at least halved each time, so there are some
3 C log2(C) steps at most for bins of C, whatever the number of items.

The result depends on the lengths and their order alone: not on the ranks, the batch or the clock.
Items of the same length are taken in their order, so shuffling them mixes the bins and changes
neither their number nor their fillings.  What the items are is the caller's affair: documents of a
shard here, and whatever else has a length and a mask of its own.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.integer], capacity: int) -> IntArray:
    """Return the number of the bin of each item, int64 [items]; bins count from 0 without a gap.

    The items of a bin are in no order: theirs is the caller's.

    Args:
        lengths: of the items, each 1 .. `capacity`.
        capacity: what the lengths of a bin's items add up to at most.

    Raises:
        ValueError: when a length is not among those.
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    # Sixteen bits are sorted by counting, in a tenth of the time.
    narrow = lengths.astype(np.uint16 if capacity < 1 << 16 else np.int64)
    by_length = np.argsort(narrow, kind="stable")
    counts = length_counts(lengths, capacity)
    first_of = np.cumsum(counts) - counts
    bins = 0
    with_room: defaultdict[int, deque[IntArray]] = defaultdict(deque)
    for move in _moves(counts, capacity):
        if move.room == capacity:
            numbers = np.arange(bins, bins + move.bins, dtype=np.int64)
            bins += move.bins
        else:
            numbers = _take(with_room[move.room], move.bins)
        start = first_of[move.length]
        first_of[move.length] += move.bins * move.each
        bin_of[by_length[start : first_of[move.length]]] = np.repeat(numbers, move.each)
        room_left = move.room - move.each * move.length
        if room_left:
            with_room[room_left].append(numbers)
    return bin_of


def count_bins(counts: IntArray, capacity: int) -> int:
    """Return how many bins `pack` fills with items of which `counts[l]` have length l."""
    return sum(move.bins for move in _moves(counts, capacity) if move.room == capacity)


def length_counts(lengths: npt.NDArray[np.integer], capacity: int) -> IntArray:
    """Return how many items have each length, int64 [capacity + 1].

    Raises:
        ValueError: when a length is not 1 .. `capacity`.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} .. {lengths.max()} in bins of {capacity}")
    return np.bincount(lengths, minlength=capacity + 1).astype(np.int64, copy=False)


class _Move(NamedTuple):
    """`bins` bins with `room` take `each` items of `length`; all the room there is: new bins."""

    length: int
    room: int
    bins: int
    each: int


def _moves(counts: IntArray, capacity: int) -> Iterator[_Move]:
    """Yield best-fit decreasing for so many items of each length, item by item but in bulk."""
    bins_with = [0] * (capacity + 1)
    rooms = 0  # bit r: there are bins with room r
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            enough = rooms >> length
            room = length + (enough & -enough).bit_length() - 1 if enough else capacity
            each = room // length
            bins = left // each
            if enough:
                bins = min(bins, bins_with[room])
            if not bins:  # the last items do not fill a bin as far as they could
                bins, each = 1, left
            left -= bins * each
            yield _Move(length, room, bins, each)
            if enough:
                bins_with[room] -= bins
                if not bins_with[room]:
                    rooms ^= 1 << room
            room_left = room - each * length
            if room_left:
                bins_with[room_left] += bins
                rooms |= 1 << room_left


def _take(queue: deque[IntArray], count: int) -> IntArray:
    """Take the first `count` numbers off a queue of arrays."""
    taken = []
    while count:
        first = queue.popleft()
        if len(first) > count:
            queue.appendleft(first[count:])
            first = first[:count]
        taken.append(first)
        count -= len(first)
    return taken[0] if len(taken) == 1 else np.concatenate(taken)


@dataclass(frozen=True)
class WholeDocuments:
    """What packing makes of documents.

    Attributes:
        sequence_length: S; a sample holds S + 1 tokens, of which the last is a label only.
        documents: of the corpus.
        split: documents of more than S + 1 tokens, which are cut into pieces.
        left_out: documents of one token or none, in which nothing is to be predicted.
        pieces: of all documents; one of a document that is neither split nor left out.
        samples: that hold them.
        tokens: of all pieces, a token twice where one piece has it as label and the next as input.
    """

    sequence_length: int
    documents: int
    split: int
    left_out: int
    pieces: int
    samples: int
    tokens: int

    @property
    def padding_share(self) -> float:
        """How much of the samples holds no token."""
        return 1.0 - self.tokens / max(1, self.samples * (self.sequence_length + 1))

    def __str__(self) -> str:
        text = (
            f"{self.documents:,} documents whole in {self.samples:,} samples, "
            f"{self.padding_share:.3%} padding"
        )
        if self.split:
            text += f"; {self.split:,} are longer than a sample and cut"
        if self.left_out:
            text += f"; {self.left_out:,} of one token or none left out"
        return text

    @classmethod
    def of(cls, blocks: Iterator[IntArray], sequence_length: int) -> WholeDocuments:
        """Count, from the lengths of documents, some at a time: memory for S numbers only."""
        capacity = sequence_length + 1
        counts = np.zeros(capacity + 1, dtype=np.int64)
        documents = split = left_out = 0
        for lengths in blocks:
            documents += len(lengths)
            found = np.bincount(np.minimum(lengths, capacity + 1), minlength=capacity + 2)
            left_out += int(found[:2].sum())
            counts[2:] += found[2:-1]
            # Few are longer, and only for those there is something to be worked out.
            long = lengths[lengths > capacity]
            split += len(long)
            pieces = piece_counts(long, sequence_length)
            counts += length_counts(long - (pieces - 1) * sequence_length, capacity)
            counts[capacity] += int((pieces - 1).sum())
        return cls(
            sequence_length,
            documents,
            split,
            left_out,
            pieces=int(counts.sum()),
            samples=count_bins(counts, capacity),
            tokens=int(counts @ np.arange(capacity + 1)),
        )


def piece_counts(lengths: IntArray, sequence_length: int) -> IntArray:
    """Return how many samples, at least, it takes to have each token but the first as a label.

    Piece i of a document is its tokens [i S, i S + S + 1), so that the last label of one piece is
    the first input of the next.  Documents of one token or none have no label and no piece.
    """
    return -(-np.maximum(lengths - 1, 0) // sequence_length)


def whole_documents(
    documents: IntArray, lengths: IntArray, sequence_length: int
) -> tuple[IntArray, IntArray]:
    """Pack documents into samples of S + 1 tokens, sample after sample.

    Args:
        documents: a permutation of range(D), which decides who is packed first.
        lengths: of these documents, in their order.
        sequence_length: S.

    Returns:
        The pieces, int64 [P]: piece i of document d is i * D + d.
        Where each ends, int64 [P]: in a stream where every sample takes S + 1 places, the last ones
        of which may be empty.
    """
    capacity = sequence_length + 1
    pieces, piece_lengths = _pieces(documents, lengths, sequence_length)
    bin_of = pack(piece_lengths, capacity)
    by_bin = np.argsort(bin_of, kind="stable")
    pieces, bin_of = pieces[by_bin], bin_of[by_bin]
    ends_tokens = np.cumsum(piece_lengths[by_bin], dtype=np.int64)
    last_of_bin = np.flatnonzero(np.diff(bin_of, append=-1))
    filled = np.diff(ends_tokens[last_of_bin], prepend=0)
    padding_before = np.cumsum(capacity - filled) - (capacity - filled)
    ends_tokens += padding_before[bin_of]
    return pieces, ends_tokens


def _pieces(
    documents: IntArray, lengths: IntArray, sequence_length: int
) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """The pieces of documents, numbered as in `whole_documents`, and their lengths, int32."""
    each = piece_counts(lengths, sequence_length)
    last = np.cumsum(each)
    pieces = np.arange(last[-1] if len(last) else 0)
    pieces -= np.repeat(last - each, each)
    pieces *= len(documents)
    pieces += np.repeat(documents, each)
    piece_lengths = np.full(len(pieces), sequence_length + 1, dtype=np.int32)
    has_any = each > 0
    rest = lengths[has_any] - (each[has_any] - 1) * sequence_length
    piece_lengths[last[has_any] - 1] = rest
    return pieces, piece_lengths
