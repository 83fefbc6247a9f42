"""One sample of a corpus: its tokens, and where documents end in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sample:
    """S input tokens and, one place later, their labels; places are counted from 0.

    Attributes:
        tokens: int64 [S + 1]; the first S are the inputs, the last S the labels.
        document_ends: int64, rising, each in 1 .. S: a document has its last token at place
            end - 1, and its label is not the document's.  They come from the shard's index.
        tokens_used: inputs that are tokens of a document; the S - tokens_used after them are
            padding.
    """

    tokens: IntArray
    document_ends: IntArray
    tokens_used: int

    @property
    def sequence_length(self) -> int:
        """S."""
        return len(self.tokens) - 1

    @property
    def document_starts(self) -> IntArray:
        """Where the documents, or their parts, begin among the inputs; int64, the first is 0.

        Padding begins like a document, so that it sees nothing and is seen by none.
        """
        ends = self.document_ends
        return np.concatenate([np.zeros(1, np.int64), ends[ends < self.sequence_length]])

    def position_ids(self) -> IntArray:
        """Each input's place in its document, or in the part of it that is here; int64 [S]."""
        starts = self.document_starts
        lengths = np.diff(starts, append=self.sequence_length)
        return np.arange(self.sequence_length) - np.repeat(starts, lengths)

    def loss_mask(self, document_mask: bool) -> npt.NDArray[np.float32]:
        """1 where a label counts, fp32 [S].

        None counts in the padding, nor where padding is the label.  With `document_mask` the last
        token of a document predicts nothing: what follows is another document's.
        """
        mask = np.ones(self.sequence_length, dtype=np.float32)
        if self.tokens_used < self.sequence_length:
            mask[self.tokens_used - 1 :] = 0.0
        if document_mask:
            mask[self.document_ends - 1] = 0.0
        return mask
