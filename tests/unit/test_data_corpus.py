"""A corpus shows every token of an epoch once, in an order that only the seed and k decide."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litespark.data.corpus import Corpus
from litespark.errors import UserError
from tests.support.data import write_shard


def make_corpus(tmp_path, lengths, sequence_length, seed=1, document_range=None, name="a"):
    write_shard(tmp_path / name, lengths)
    return Corpus(tmp_path / name, document_range or (0, len(lengths)), sequence_length, seed)


def epoch_of(corpus, number):
    per_epoch = corpus.samples_per_epoch
    return [corpus[number * per_epoch + i] for i in range(per_epoch)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    sequence_length=st.integers(1, 17),
    seed=st.integers(0, 2**63),
)
def test_an_epoch_is_the_stream_of_shuffled_documents(
    tmp_path_factory, lengths, sequence_length, seed
):
    if sum(lengths) < sequence_length + 1:
        lengths = [*lengths, sequence_length + 1]
    corpus = make_corpus(tmp_path_factory.mktemp("c"), lengths, sequence_length, seed)
    total = sum(lengths)
    assert corpus.samples_per_epoch == (total - 1) // sequence_length
    for number in (0, 3):
        samples = epoch_of(corpus, number)
        # Tokens count up through the shard, so each value names its place in it.
        inputs = np.concatenate([sample[:-1] for sample in samples])
        assert (
            len(set(inputs.tolist())) == len(inputs) == corpus.samples_per_epoch * sequence_length
        )
        # Rebuild the stream from the samples: each links to the next by its last token.
        by_first = {int(sample[0]): sample for sample in samples}
        followers = {int(sample[-1]) for sample in samples}
        sample = by_first[next(first for first in by_first if first not in followers)]
        stream = [int(sample[0])]
        while sample is not None:
            stream += sample[1:].tolist()
            sample = by_first.pop(int(sample[-1]), None)
        assert len(stream) == corpus.samples_per_epoch * sequence_length + 1
        # It runs through whole documents one after another, but for the cut at its end.
        ends = np.cumsum(lengths)
        starts = {int(end - length) for end, length in zip(ends, lengths, strict=True) if length}
        for before, after in itertools.pairwise(stream):
            assert after == before + 1 or (after in starts and before + 1 in ends)


def test_samples_are_cut_from_the_stream_of_one_document(tmp_path):
    corpus = make_corpus(tmp_path, [23], 5)
    samples = sorted(sample.tolist() for sample in epoch_of(corpus, 0))
    assert samples == [list(range(i, i + 6)) for i in range(0, 20, 5)]
    assert corpus[0].dtype == np.int64


def test_epochs_and_seeds_differ_and_nothing_depends_on_what_was_asked_before(tmp_path):
    lengths = [7] * 50
    corpus = make_corpus(tmp_path, lengths, 4)
    per_epoch = corpus.samples_per_epoch
    in_order = [corpus[k].tolist() for k in range(4 * per_epoch)]
    epochs = [in_order[i * per_epoch : (i + 1) * per_epoch] for i in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    other = Corpus(tmp_path / "a", (0, 50), 4, seed=1)
    for k in np.random.default_rng(0).permutation(4 * per_epoch)[:100].tolist():
        assert other[k].tolist() == in_order[k]
    assert [Corpus(tmp_path / "a", (0, 50), 4, seed=2)[k].tolist() for k in range(5)] != in_order[
        :5
    ]


def test_order_depends_neither_on_the_name_nor_on_the_numpy_release(tmp_path):
    corpora = [make_corpus(tmp_path, [4] * 6, 4, seed=11, name=name) for name in "ab"]
    # Recorded once: a change here is a change of the data order of every resumed run.
    recorded = [16, 4, 8, 0, 20, 0, 8, 20, 4, 12]
    for corpus in corpora:
        assert [int(corpus[k][0]) for k in range(10)] == recorded


def test_document_range_bounds_what_is_read(tmp_path):
    corpus = make_corpus(tmp_path, [10] * 6, 3, document_range=(2, 4))
    assert corpus.tokens == 20
    seen = {int(token) for sample in epoch_of(corpus, 0) for token in sample}
    assert seen <= set(range(20, 40))


def test_too_few_tokens_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="hold 8 tokens, fewer than one sample of 8"):
        make_corpus(tmp_path, [3, 5], 8)
    assert len(make_corpus(tmp_path, [3, 6], 8)[0]) == 9


def test_only_two_epochs_are_kept(tmp_path):
    corpus = make_corpus(tmp_path, [10] * 6, 3)
    for number in range(5):
        corpus[number * corpus.samples_per_epoch]
    assert len(corpus._epochs) == 2
