"""Packing: documents stay whole, nothing is lost or seen twice, and the bins are best-fit's."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from litespark.cli.main import main
from litespark.config import load_config
from litespark.config.validate import validate
from litespark.data.blend import open_blend
from litespark.data.corpus import Corpus, PackedCorpus
from litespark.data.loader import BatchLoader
from litespark.data.packing import WholeDocuments, count_bins, length_counts, pack
from litespark.data.sample_index import IndexCache
from litespark.errors import UserError
from tests.support.data import write_shard

LENGTHS = [5, 0, 17, 3, 40, 9, 0, 1, 6, 7] * 12
SEQUENCE = 16


def best_fit_decreasing(lengths, capacity):
    """The textbook's: one item at a time; the rooms left, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 70))
def test_bins_are_those_of_best_fit_decreasing(data, capacity):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=80)), dtype=np.int64)
    bin_of = pack(lengths, capacity)
    filled = np.bincount(bin_of, weights=lengths).astype(int)
    assert sorted((capacity - filled).tolist()) == best_fit_decreasing(lengths.tolist(), capacity)
    assert count_bins(length_counts(lengths, capacity), capacity) == len(filled)
    order = np.array(data.draw(st.permutations(range(len(lengths)))), dtype=np.int64)
    assert len(np.unique(pack(lengths[order], capacity))) == len(filled)


def test_items_of_one_length_are_taken_in_their_order():
    assert pack(np.array([3, 2, 3, 1, 2, 3]), 4).tolist() == [0, 3, 1, 0, 3, 2]


@pytest.mark.parametrize("lengths", [[1, 0], [1, 9], [-1]])
def test_lengths_that_fit_no_bin_are_refused(lengths):
    with pytest.raises(ValueError, match="in bins of 8"):
        pack(np.array(lengths), 8)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    sequence_length=st.integers(1, 17),
    seed=st.integers(0, 2**63),
)
def test_an_epoch_predicts_each_token_of_each_document_once(
    tmp_path_factory, lengths, sequence_length, seed
):
    lengths = [*lengths, 2]
    prefix = tmp_path_factory.mktemp("c") / "a"
    tokens = write_shard(prefix, lengths)
    starts = (np.cumsum(lengths) - lengths)[np.array(lengths) > 0]
    first_tokens = set(starts.tolist())
    corpus = PackedCorpus(prefix, (0, len(lengths)), sequence_length, seed)
    for epoch in (0, 2):
        labels: list[int] = []
        places = 0
        for k in range(corpus.samples_per_epoch):
            sample = corpus.read(epoch * corpus.samples_per_epoch + k)
            counts = sample.loss_mask(document_mask=True).astype(bool)
            inputs, targets = sample.tokens[:-1], sample.tokens[1:]
            # Tokens count up through the shard: where a label counts, it follows from its input.
            assert (targets[counts] == inputs[counts] + 1).all()
            labels += targets[counts].tolist()
            places += sample.tokens_used + int(counts[-1])
            # A document begins with its first token, or whole samples after it where it was cut.
            begins = sample.document_starts[sample.document_starts < sample.tokens_used]
            for token in inputs[begins].tolist():
                before = token - int(starts[np.searchsorted(starts, token, side="right") - 1])
                assert before % sequence_length == 0
            assert not sample.tokens[sample.tokens_used + int(counts[-1]) :].any()
        assert sorted(labels) == sorted(set(tokens.tolist()) - first_tokens)
        assert places == corpus.packing.tokens


def test_what_packing_says_of_itself():
    found = WholeDocuments.of(iter([np.array([17, 5, 0]), np.array([18, 40, 1, 12])]), 16)
    # 17 | 17, 2 (of 18) | 17, 17, 8 (of 40) | 5 | 12
    assert (found.documents, found.split, found.left_out) == (7, 2, 2)
    assert (found.pieces, found.tokens) == (8, 17 + 17 + 2 + 17 + 17 + 8 + 5 + 12)
    assert found.samples == 6  # four of 17, 12 + 5, 8 + 2
    assert found.padding_share == pytest.approx(7 / (6 * 17))
    assert str(found) == (
        "7 documents whole in 6 samples, 6.863% padding; 2 are longer than a sample and cut; "
        "2 of one token or none left out"
    )


def packed(prefix, cache=None, seed=1):
    return PackedCorpus(prefix, (3, len(LENGTHS)), SEQUENCE, seed, cache)


def test_documents_of_a_sample(tmp_path):
    write_shard(tmp_path / "a", LENGTHS)
    corpus = packed(tmp_path / "a")
    assert corpus.packing.padding_share < 0.02
    sample = next(s for s in map(corpus.read, range(99)) if s.tokens_used < SEQUENCE)
    assert sample.document_ends[-1] == sample.tokens_used
    assert sample.position_ids()[sample.tokens_used] == 0
    assert sample.loss_mask(document_mask=True)[sample.tokens_used - 1 :].sum() == 0


def test_order_depends_neither_on_the_machine_nor_on_the_numpy_release(tmp_path):
    write_shard(tmp_path / "a", LENGTHS)
    # Recorded once: a change here is a change of the data of every resumed run.
    recorded = [286, 201, 817, 797, 374, 885, 993, 673]
    assert [int(packed(tmp_path / "a")[k][0]) for k in range(8)] == recorded


def test_index_is_kept_apart_from_that_of_the_stream(tmp_path):
    write_shard(tmp_path / "a", LENGTHS)
    cache = IndexCache(str(tmp_path / "index"))
    expected = [packed(tmp_path / "a")[k].tolist() for k in range(150)]
    assert [packed(tmp_path / "a", cache)[k].tolist() for k in range(150)] == expected
    stream = Corpus(tmp_path / "a", (3, len(LENGTHS)), SEQUENCE, 1)
    assert cache.find(packed(tmp_path / "a").order_request(0)).how == "found"
    assert cache.find(stream.order_request(0)).how == "built"


def test_ranks_and_micro_batches_change_no_sample(tmp_path):
    write_shard(tmp_path / "a", LENGTHS)
    blend = open_blend([(str(tmp_path / "a"), 1.0)], (1, 0, 0), "train", 16, 3, None, True)
    assert blend is not None

    def rows(ranks, micro, consumed, steps):
        loaders = [
            BatchLoader(blend, micro, 24, rank, ranks, consumed, document_mask=True)
            for rank in range(ranks)
        ]
        taken = []
        for _ in range(steps):
            of_ranks = [loader.next_step() for loader in loaders]
            taken += [
                row
                for batches in zip(*of_ranks, strict=True)
                for b in batches
                for row in b.tokens_bs
            ]
        for loader in loaders:
            loader.close()
        return [row.tolist() for row in taken]

    samples = blend.corpora[0].samples_per_epoch
    assert samples % 24
    whole = rows(1, 2, 0, 5)
    assert len(whole) > samples
    assert rows(4, 2, 0, 2) + rows(2, 1, 48, 3) == whole


def test_nothing_to_predict_is_the_users_error(tmp_path):
    write_shard(tmp_path / "a", [1, 0, 1])
    with pytest.raises(UserError, match="nothing to be predicted"):
        PackedCorpus(tmp_path / "a", (0, 3), 4, 1)


CONFIG = {
    "run": {"output_dir": "run"},
    "model": {"preset": "tiny"},
    "data": {"sequence_length": SEQUENCE, "packing": "whole", "document_mask": True},
    "batch": {"global": 8},
    "optimizer": {"lr": 1e-3},
    "training": {"steps": 2},
}


def test_packing_needs_document_masks(tmp_path):
    path = tmp_path / "run.yaml"
    data = CONFIG["data"] | {"blend": [{"prefix": "a"}]}
    path.write_text(yaml.safe_dump(CONFIG | {"data": data}))
    assert not [e for e in validate(load_config(str(path), []), 1) if "packing" in str(e)]
    errors = validate(load_config(str(path), ["data.document_mask=false"]), 1)
    assert any("data.packing = whole" in str(error) for error in errors)


def test_index_command_tells_what_packing_does(tmp_path, capsys):
    write_shard(tmp_path / "a", LENGTHS, vocab_size=200)
    path = tmp_path / "run.yaml"
    data = CONFIG["data"] | {"blend": [{"prefix": str(tmp_path / "a")}]}
    path.write_text(yaml.safe_dump(CONFIG | {"data": data}))
    for how in ("built", "found"):
        assert main(["data", "index", str(path), f"data.index_cache={tmp_path / 'index'}"]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert "documents whole in" in first
        assert "% padding" in first
        assert "_whole_length16_seed" in second
        assert f": {how}," in second
