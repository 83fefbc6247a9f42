"""Several corpora mixed in given proportions, as a pure function of the sample's number.

The corpora hang on a binary tree.  At a node whose left side has the share p, the left side has
had floor(p m + 1/2) of the first m samples that passed the node; sample m goes left when that
number grows at m, and its number within the side is the count of those before it.  Going down the
tree turns sample k of the blend into sample i of corpus c, in some ten integer operations, with
no table and no state.

A node errs by at most half a sample, and what a parent erred is shared out by the proportions on
the way down.  Subtrees are joined lightest first (Huffman), so a node weighs no more than its
uncle and two levels at least halve the weight; that keeps every corpus within 1/2 (1 + 1 + 1/2 +
1/2 + 1/4 + ...) = 2 samples of its exact share at every k, and within 1 for up to three corpora.
Serving each corpus at its own times (n + 1/2)/w, the obvious way, has no such bound: with one
corpus of 50 % and fifty of 1 %, the first 24 samples would all come from the large one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from litespark.data.corpus import Corpus, PackedCorpus
from litespark.data.indexed import IndexedReader, bin_path, idx_path
from litespark.data.manifest import manifest_path, read_manifest
from litespark.data.sample import Sample
from litespark.data.sample_index import IndexCache
from litespark.data.verify import check_counts
from litespark.errors import UserError

Part = Literal["train", "validation", "test"]
_PARTS: tuple[Part, ...] = ("train", "validation", "test")
_WEIGHT_UNITS = 1 << 40  # weights become integers, so that no rounding depends on k


@dataclass(frozen=True)
class _Node:
    """An inner node: of `total` units of weight, `left_weight` are on the left."""

    left: _Tree
    right: _Tree
    left_weight: int
    total: int

    def passed_left(self, samples: int) -> int:
        """Return how many of the first `samples` went left: floor(samples p + 1/2), exactly."""
        return (2 * samples * self.left_weight + self.total) // (2 * self.total)


_Tree = _Node | int  # a leaf is the corpus number


class SampleSequence(Protocol):
    """What a blend mixes: an endless sequence of samples of a shard, a `Corpus` or another."""

    sequence_length: int

    def read(self, index: int, /) -> Sample:
        """Return sample `index`, 0 or more."""
        ...


C = TypeVar("C", bound=SampleSequence)


class Blend(Generic[C]):
    """An endless sequence of samples of several corpora, mixed by `weights` (any positive scale).

    Each corpus gives its samples 0, 1, 2, ... in order, each once.

    Raises:
        UserError: when a weight is not a positive number.
    """

    def __init__(self, corpora: Sequence[C], weights: Sequence[float]) -> None:
        if not corpora or len(corpora) != len(weights):
            raise ValueError(f"{len(corpora)} corpora and {len(weights)} weights")
        self.corpora = tuple(corpora)
        self.weights = normalized_weights(weights)
        self.sequence_length = self.corpora[0].sequence_length
        if any(corpus.sequence_length != self.sequence_length for corpus in self.corpora):
            raise ValueError("the corpora of a blend have one sequence length")
        self._tree = _build_tree(self.weights)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (corpus number, sample number in that corpus) of sample `index` of the blend."""
        if index < 0:
            raise IndexError(f"sample {index}")
        node = self._tree
        while isinstance(node, _Node):
            before = node.passed_left(index)
            if node.passed_left(index + 1) > before:
                node, index = node.left, before
            else:
                node, index = node.right, index - before
        return node, index

    def samples_used(self, samples: int) -> tuple[int, ...]:
        """Return how many of the first `samples` of the blend each corpus gives."""
        used = [0] * len(self.corpora)
        todo = [(self._tree, samples)]
        while todo:
            node, passed = todo.pop()
            if isinstance(node, _Node):
                left = node.passed_left(passed)
                todo += [(node.left, left), (node.right, passed - left)]
            else:
                used[node] = passed
        return tuple(used)

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Return the tokens of sample `index`, int64 [sequence_length + 1]; see `read`."""
        return self.read(index).tokens

    def read(self, index: int) -> Sample:
        """Return sample `index`, 0 or more and without end."""
        corpus, sample = self.locate(index)
        return self.corpora[corpus].read(sample)


def normalized_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights scaled to the sum 1.

    Raises:
        UserError: when a weight is not a positive, finite number.
    """
    for number, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise UserError(
                f"data.blend[{number}].weight = {weight}",
                "is not a positive number",
                "Give a positive weight, or take the corpus out of the blend.",
            )
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _build_tree(weights: Sequence[float]) -> _Tree:
    # The second item breaks ties, so that equal weights give the same tree everywhere.
    heap: list[tuple[int, int, _Tree]] = [
        (max(1, round(weight * _WEIGHT_UNITS)), number, number)
        for number, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    made = len(heap)
    while len(heap) > 1:
        light_weight, _, light = heapq.heappop(heap)
        heavy_weight, _, heavy = heapq.heappop(heap)
        total = light_weight + heavy_weight
        heapq.heappush(heap, (total, made, _Node(heavy, light, heavy_weight, total)))
        made += 1
    return heap[0][2]


def open_blend(
    entries: Sequence[tuple[str, float]],
    split: tuple[float, float, float],
    part: Part,
    sequence_length: int,
    seed: int,
    index_cache: IndexCache | None = None,
    whole_documents: bool = False,
) -> Blend[Corpus] | None:
    """Open one part of a blend; see `open_blends`."""
    return open_blends(
        entries, split, (part,), sequence_length, seed, index_cache, whole_documents
    )[0]


def open_blends(
    entries: Sequence[tuple[str, float]],
    split: tuple[float, float, float],
    parts: Sequence[Part],
    sequence_length: int,
    seed: int,
    index_cache: IndexCache | None = None,
    whole_documents: bool = False,
) -> list[Blend[Corpus] | None]:
    """Open parts of a blend, each shard once; None for a part whose share in `split` is 0.

    Args:
        entries: (prefix, weight) of each shard, the prefix in full (`P_text_document`).
        split: shares of train, validation and test in any scale ("969,30,1"); each shard's
            documents are cut into three runs in stored order, at the same places as megatron-core
            cuts.
        parts: which of the three.
        sequence_length: tokens of a sample, without the extra one for the last label.
        seed: of the orders, 0 or more.
        index_cache: where the corpora keep their orders; None to build them in memory.
        whole_documents: pack them, instead of cutting their stream.

    Raises:
        UserError: when a shard is missing or damaged, a share or weight is no such number, or a
            part has too few tokens for one sample.
    """
    bounds_of = dict(zip(_PARTS, _split_bounds(split), strict=True))
    if all(bounds_of[part][0] == bounds_of[part][1] for part in parts):
        return [None] * len(parts)
    if not entries:
        raise UserError("data.blend", "names no shard", "Add an entry with a prefix and a weight.")
    weights = normalized_weights([weight for _, weight in entries])
    readers = _open_readers([prefix for prefix, _ in entries])
    kind = PackedCorpus if whole_documents else Corpus
    blends: list[Blend[Corpus] | None] = []
    for part in parts:
        corpora = []
        for reader in readers:
            documents = part_range(reader.prefix, reader.documents, split, part)
            if documents is not None:
                corpora.append(kind(reader, documents, sequence_length, seed, index_cache))
        blends.append(Blend(corpora, weights) if corpora else None)
    return blends


def packing_lines(blends: Iterable[Blend | None]) -> list[str]:
    """What packing makes of the corpora of blends, a line for each; none where streams are cut."""
    corpora = [corpus for blend in blends if blend is not None for corpus in blend.corpora]
    return [
        "{}, documents {}..{}: {}".format(corpus.prefix, *corpus.document_range, corpus.packing)
        for corpus in corpora
        if isinstance(corpus, PackedCorpus)
    ]


def _open_readers(prefixes: Sequence[str]) -> list[IndexedReader]:
    _require_shards(prefixes)
    readers = []
    for prefix in prefixes:
        reader = IndexedReader(prefix)
        manifest = read_manifest(prefix)
        if manifest is not None:
            check_counts(prefix, reader.index, manifest)
        readers.append(reader)
    return readers


def part_range(
    prefix: str, count: int, split: tuple[float, float, float], part: Part
) -> tuple[int, int] | None:
    """The documents [first, last) of a shard's `count` that belong to a part; None for a 0.

    Raises:
        UserError: a share is no such number, or the part gets no document.
    """
    bounds = dict(zip(_PARTS, _split_bounds(split), strict=True))[part]
    if bounds[0] == bounds[1]:
        return None
    first, last = (round(bound * count) for bound in bounds)
    if first == last:
        raise UserError(
            f"data.split = {','.join(f'{share:g}' for share in split)}",
            f"leaves the {part} part none of the {count} documents of {prefix}",
            "Give that part a larger share, or 0 to do without it.",
        )
    return first, last


def _require_shards(prefixes: Sequence[str]) -> None:
    """Name all shards of a blend that are missing; one alone is explained where it is opened."""
    missing = [p for p in prefixes if not (bin_path(p).exists() or idx_path(p).exists())]
    if len(missing) > 1:
        raise UserError(
            "data.blend",
            f"names {len(prefixes)} shards, and {len(missing)} are not there: {', '.join(missing)}",
            "Write them with litespark preprocess, mend the prefixes, or take them out.",
        )


def _split_bounds(split: tuple[float, float, float]) -> tuple[tuple[float, float], ...]:
    """Return the (start, stop) of each part as fractions of the documents."""
    if len(split) != 3 or any(not 0 <= share < float("inf") for share in split) or not sum(split):
        raise UserError(
            f"data.split = {split}",
            "is not three shares of 0 or more with a positive sum",
            "Write, for example, 969,30,1.",
        )
    total = sum(split)
    ends = [sum(split[: number + 1]) / total for number in range(3)]
    return ((0.0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2]))


def check_tokenizer(
    entries: Sequence[tuple[str, float]],
    vocab_size: int,
    tokenizer_identity: str | None,
    tokenizer_path: str | None = None,
) -> None:
    """Refuse shards that the model cannot read; shards without a manifest pass.

    Args:
        entries: as for `open_blend`.
        vocab_size: rows of the model's embedding.
        tokenizer_identity: SHA-256 of the run's tokenizer file, None when the run has none.
        tokenizer_path: that file, for the message.

    Raises:
        UserError: when a shard's vocabulary exceeds the model's, or tokenizers differ.
    """
    expected, whose = tokenizer_identity, f"the run's tokenizer {tokenizer_path or ''}".rstrip()
    for prefix, _ in entries:
        manifest = read_manifest(prefix)
        if manifest is None:
            continue
        tokenizer = manifest.tokenizer
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                prefix,
                f"was written with a vocabulary of {tokenizer.vocab_size}, the model has "
                f"model.vocab_size = {vocab_size}",
                f"Set model.vocab_size to {tokenizer.vocab_size} or more.",
            )
        if expected is not None and tokenizer.identity != expected:
            raise UserError(
                prefix,
                f"was written with a tokenizer {tokenizer.name} of SHA-256 "
                f"{tokenizer.identity[:12]} (says {manifest_path(prefix)}), which differs from "
                f"{whose}, SHA-256 {expected[:12]}",
                "Preprocess all shards with the tokenizer that the run names.",
            )
        if expected is None:
            expected, whose = tokenizer.identity, f"that of {prefix}, {tokenizer.name}"
