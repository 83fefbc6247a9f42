"""Where documents end in a sample, and what of it reaches the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litespark.data.corpus import Corpus
from litespark.data.loader import BatchLoader
from litespark.data.sample import Sample
from tests.support.data import write_shard


def sample(length, ends, used=None):
    return Sample(np.arange(length + 1), np.array(ends, np.int64), length if used is None else used)


@pytest.mark.parametrize(
    ("made", "starts", "positions", "mask", "unmasked"),
    [
        (sample(5, []), [0], [0, 1, 2, 3, 4], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        (sample(5, [2]), [0, 2], [0, 1, 0, 1, 2], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]),
        (sample(5, [1, 5]), [0, 1], [0, 0, 1, 2, 3], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]),
        (sample(5, [1, 2, 3, 4, 5]), [0, 1, 2, 3, 4], [0] * 5, [0] * 5, [1] * 5),
        # The padding is no document's, and no label.
        (sample(5, [3], 3), [0, 3], [0, 1, 2, 0, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]),
        (sample(5, [2, 3], 3), [0, 2, 3], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]),
        (sample(5, [4], 4), [0, 4], [0, 1, 2, 3, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]),
    ],
)
def test_what_documents_make_of_a_sample(made, starts, positions, mask, unmasked):
    assert made.document_starts.tolist() == starts
    assert made.position_ids().tolist() == positions
    assert made.loss_mask(document_mask=True).tolist() == mask
    assert made.loss_mask(document_mask=False).tolist() == unmasked
    assert made.loss_mask(document_mask=True).dtype == np.float32


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    sequence_length=st.integers(1, 17),
)
def test_ends_are_those_of_the_shards_documents(tmp_path_factory, lengths, sequence_length):
    """Tokens count up through the shard, so a document ends where the next number begins another;
    or where none does: two documents that follow each other in the shard may do so here."""
    lengths = [*lengths, sequence_length + 1]
    prefix = tmp_path_factory.mktemp("c") / "a"
    write_shard(prefix, lengths)
    corpus = Corpus(prefix, (0, len(lengths)), sequence_length, 1)
    last_tokens = set((np.cumsum(lengths) - 1)[np.array(lengths) > 0].tolist())
    for k in range(2 * corpus.samples_per_epoch):
        found = corpus.read(k)
        inputs = found.tokens[:-1].tolist()
        assert found.document_ends.tolist() == [
            place + 1 for place, token in enumerate(inputs) if token in last_tokens
        ]
        assert found.tokens_used == sequence_length
        assert np.array_equal(found.tokens, corpus[k])


class Three:
    """Sample k has its end at place k % 3 + 1 of 4, and at its own end."""

    def read(self, index):
        return Sample(np.arange(5) + 10 * index, np.array([index % 3 + 1, 4]), 4)


def test_rows_of_a_batch_are_numbered_through():
    loader = BatchLoader(Three(), 3, 3, 0, 1, document_mask=True)
    (batch,) = loader.next_step()
    loader.close()
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 1, 4, 6, 8, 11, 12]
    assert str(batch.cu_seqlens.dtype) == "torch.int32"
    assert batch.longest_document_tokens == 3
    assert batch.position_ids_bs.tolist() == [[0, 0, 1, 2], [0, 1, 0, 1], [0, 1, 2, 0]]
    assert batch.loss_mask_bs.tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]]


def test_without_the_mask_documents_leave_no_trace():
    loader = BatchLoader(Three(), 3, 3, 0, 1)
    (batch,) = loader.next_step()
    loader.close()
    assert batch.cu_seqlens is None
    assert batch.position_ids_bs.tolist() == [[0, 1, 2, 3]] * 3
    assert batch.loss_mask_bs.tolist() == [[1] * 4] * 3
