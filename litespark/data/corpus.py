"""One shard as an endless, shuffled, random-access sequence of samples.

Epoch e puts the documents in a random order, joins them into one stream, and cuts it every S
tokens: sample j is the tokens [j S, j S + S + 1), the one extra being the last label.  The
samples of the epoch are then drawn in a second random order.  With N samples an epoch, sample k
of the corpus is the draw k mod N of epoch k // N.  Both orders come from (seed, epoch) alone, so
a sample is a pure function of the shard, the seed and k, and a resumed run needs only its count
of samples.  What is kept on disk, the sample index, saves time and memory and decides nothing.

`PackedCorpus` does not cut the stream: a sample is made of whole documents (`packing.py`), and
everything else is as above.

The orders are the sorting permutation of raw bits of Philox, whose stream NumPy fixes for ever,
and not `Generator.permutation`, whose algorithm may change between releases and with it the data
of a resumed run.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import replace
from threading import Lock

import numpy as np
import numpy.typing as npt

from litespark.data.indexed import IndexedReader
from litespark.data.packing import WholeDocuments
from litespark.data.sample import Sample
from litespark.data.sample_index import EpochOrder, IndexCache, OrderRequest
from litespark.errors import UserError

_EPOCHS_KEPT = 2  # samples near the border of two epochs alternate between them in a blend


class Corpus:
    """Samples of `sequence_length` + 1 tokens from a range of a shard's documents.

    Memory, without a cache: 16 bytes a document and 8 a sample for each of two epochs.  Threads
    may share it.

    Args:
        prefix: the shard's path without `.bin`, or its open reader.
        document_range: the documents [start, stop) in stored order.
        sequence_length: S, in tokens.
        seed: of the orders, 0 or more.
        index_cache: where the orders are kept and mapped from; None to build them in memory.

    Raises:
        UserError: when the shard is damaged (see `IndexedReader`) or has fewer than S + 1 tokens
        here.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str] | IndexedReader,
        document_range: tuple[int, int],
        sequence_length: int,
        seed: int,
        index_cache: IndexCache | None = None,
    ) -> None:
        start, stop = document_range
        reader = prefix if isinstance(prefix, IndexedReader) else IndexedReader(prefix)
        self.prefix = reader.prefix
        self.document_range = (start, stop)
        self.sequence_length = sequence_length
        self.seed = seed
        self._reader = reader
        self._index_cache = index_cache
        self._documents = reader.span(start, stop)
        self.tokens = self._documents.tokens
        self.samples_per_epoch = self._count_samples()
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()
        self._lock = Lock()

    def _count_samples(self) -> int:
        if self.tokens < self.sequence_length + 1:
            raise UserError(
                "{}, documents {}..{}".format(self.prefix, *self.document_range),
                f"hold {self.tokens} tokens, fewer than one sample of {self.sequence_length} + 1",
                "Use a larger shard, give this part a larger share in data.split, or lower "
                "data.sequence_length.",
            )
        return (self.tokens - 1) // self.sequence_length

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Return the tokens of sample `index`, int64 [sequence_length + 1]; see `read`."""
        return self.read(index).tokens

    def read(self, index: int) -> Sample:
        """Return sample `index`, 0 or more and without end."""
        if index < 0:
            raise IndexError(f"sample {index}")
        number, position = divmod(index, self.samples_per_epoch)
        epoch = self._epoch(number)
        return self._read_sample(epoch, int(epoch.samples[position]))

    def _read_sample(self, epoch: EpochOrder, number: int) -> Sample:
        """Sample `number` in the order of the stream."""
        first_token = number * self.sequence_length
        sample = np.empty(self.sequence_length + 1, dtype=np.int64)
        ends: list[int] = []
        # side="right" steps over empty documents, whose end is also their start.
        place = int(np.searchsorted(epoch.ends_tokens, first_token, side="right"))
        filled = 0
        while filled < len(sample):
            document = int(epoch.documents[place])
            end_token = int(epoch.ends_tokens[place])
            length = min(end_token - first_token, len(sample) - filled)
            tokens = self._reader.read(self.document_range[0] + document)
            offset = len(tokens) - (end_token - first_token)
            sample[filled : filled + length] = tokens[offset : offset + length]
            filled += length
            first_token += length
            place += 1
            if length and first_token == end_token and filled <= self.sequence_length:
                ends.append(filled)
        return Sample(sample, np.array(ends, dtype=np.int64), self.sequence_length)

    def order_request(self, epoch: int) -> OrderRequest:
        """What the sample index of an epoch is made from."""
        return OrderRequest(
            self.prefix,
            self.document_range,
            self._documents,
            self.sequence_length,
            self.samples_per_epoch,
            self.seed,
            epoch,
        )

    def _epoch(self, number: int) -> EpochOrder:
        with self._lock:
            epoch = self._epochs.get(number)
            if epoch is None:
                request = self.order_request(number)
                cache = self._index_cache
                epoch = request.build() if cache is None else cache.find(request).order
                self._epochs[number] = epoch
                while len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return epoch


class PackedCorpus(Corpus):
    """Samples made of whole documents, as few as hold them all; see `packing`.

    A document of more than S + 1 tokens is cut into pieces.  Where documents leave a sample with
    room there are zeros, which count as no document's tokens.  To be used with document masks.

    Raises:
        UserError: when the shard is damaged or no document here has two tokens.
    """

    packing: WholeDocuments

    def _count_samples(self) -> int:
        self.packing = WholeDocuments.of(self._documents.blocks(), self.sequence_length)
        if not self.packing.samples:
            raise UserError(
                "{}, documents {}..{}".format(self.prefix, *self.document_range),
                "have one token or none, so there is nothing to be predicted",
                "Use a larger shard, or give this part a larger share in data.split.",
            )
        return self.packing.samples

    def order_request(self, epoch: int) -> OrderRequest:
        """What the sample index of an epoch is made from."""
        return replace(super().order_request(epoch), pieces=self.packing.pieces)

    def _read_sample(self, epoch: EpochOrder, number: int) -> Sample:
        size = self.sequence_length + 1
        tokens = np.zeros(size, dtype=np.int64)
        first_token, filled = number * size, 0
        place = int(np.searchsorted(epoch.ends_tokens, first_token, side="right"))
        ends: list[int] = []
        while place < len(epoch.documents):
            end = int(epoch.ends_tokens[place]) - first_token
            if end > size:
                break  # of the next sample
            piece, document = divmod(int(epoch.documents[place]), len(self._documents))
            skipped = piece * self.sequence_length
            whole = self._reader.read(self.document_range[0] + document)
            tokens[filled:end] = whole[skipped : skipped + end - filled]
            if skipped + end - filled == len(whole) and end < size:
                ends.append(end)
            filled = end
            place += 1
        used = min(filled, self.sequence_length)
        return Sample(tokens, np.array(ends, dtype=np.int64), used)
