"""A blend uses each corpus in order, each sample once, close to its share at every moment."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from litespark.data.blend import Blend, check_tokenizer, open_blend
from litespark.data.corpus import Corpus
from litespark.data.preprocess import PreprocessOptions, preprocess
from litespark.data.sample import Sample
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import UserError
from tests.support.data import train_json_tokenizer, write_jsonl, write_shard

WEIGHTS = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.sampled_from([0.1, 0.2, 0.5, 1.0, 3.0])),
    min_size=1,
    max_size=60,
)


class CountingCorpus:
    """Stands for a corpus; sample k is [k]."""

    sequence_length = 0

    def read(self, index):
        return Sample(np.array([index]), np.array([], np.int64), 0)


def blend_of(weights):
    return Blend([CountingCorpus() for _ in weights], weights)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**12))
@example(weights=[50.0] + [1.0] * 50, start=0)
@example(weights=[1.0] * 60, start=0)
def test_shares_hold_at_every_sample_and_each_is_used_once_in_order(weights, start):
    blend = blend_of(weights)
    total = sum(Fraction(weight) for weight in weights)
    shares = [float(Fraction(weight) / total) for weight in weights]
    bound = 1.0 if len(weights) <= 3 else 2.0
    used = [0] * len(weights)
    for k in range(600):
        corpus, sample = blend.locate(k)
        assert sample == used[corpus]
        used[corpus] += 1
        deviation = max(abs(n - share * (k + 1)) for n, share in zip(used, shares, strict=True))
        assert deviation <= bound + 1e-6
    # Far from the beginning too: the counts implied by random access are consistent.
    seen: dict[int, int] = {}
    for k in range(start, start + 300):
        corpus, sample = blend.locate(k)
        assert sample == seen.get(corpus, sample)
        seen[corpus] = sample + 1
        # Weights are held in units of 2**-40, which shows after 10**12 samples.
        assert abs(sample - shares[corpus] * k) <= bound + 1 + len(weights) * k * 2.0**-40


def test_two_equal_corpora_alternate():
    blend = blend_of([1.0, 1.0])
    assert [blend.locate(k)[0] for k in range(6)] in ([0, 1] * 3, [1, 0] * 3)


def test_scale_of_the_weights_does_not_matter():
    few, many = blend_of([0.1, 0.2, 0.7]), blend_of([10, 20, 70])
    assert [few.locate(k) for k in range(1000)] == [many.locate(k) for k in range(1000)]


def test_sample_is_the_corpus_sample():
    blend = blend_of([3.0, 1.0])
    assert [int(blend[k][0]) for k in range(8)] == [blend.locate(k)[1] for k in range(8)]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_weight_is_refused(weight):
    with pytest.raises(UserError, match="not a positive number") as caught:
        blend_of([1.0, weight])
    assert "data.blend[1].weight" in caught.value.where


class TestOpenBlend:
    """From the config's entries to a part of the blend."""

    def entries(self, tmp_path):
        write_shard(tmp_path / "a", [10] * 100)
        write_shard(tmp_path / "b", [10] * 50)
        return [(str(tmp_path / "a"), 3.0), (str(tmp_path / "b"), 1.0)]

    def test_parts_are_runs_of_documents_that_cover_all(self, tmp_path):
        entries = self.entries(tmp_path)
        split = (80.0, 15.0, 5.0)
        parts = ("train", "validation", "test")
        blends = [open_blend(entries, split, part, 4, 1) for part in parts]
        assert all(blend is not None for blend in blends)
        ranges = [[corpus.document_range for corpus in blend.corpora] for blend in blends]
        assert [r[0] for r in ranges] == [(0, 80), (80, 95), (95, 100)]
        assert [r[1] for r in ranges] == [(0, 40), (40, 48), (48, 50)]
        assert blends[0].weights == (0.75, 0.25)
        tokens = {int(t) for k in range(400) for t in blends[0].corpora[0][k]}
        assert tokens <= set(range(800))

    def test_cuts_are_megatrons(self, tmp_path):
        from megatron.core.datasets.blended_megatron_dataset_config import (
            convert_split_vector_to_split_matrix,
            parse_and_normalize_split,
        )

        write_shard(tmp_path / "a", [10] * 997)
        split = (969.0, 30.0, 1.0)
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split("969,30,1"))
        for part, bounds in zip(("train", "validation", "test"), matrix, strict=True):
            blend = open_blend([(str(tmp_path / "a"), 1.0)], split, part, 4, 1)
            expected = tuple(round(bound * 997) for bound in bounds)
            assert blend.corpora[0].document_range == expected

    def test_share_of_zero_gives_none(self, tmp_path):
        entries = self.entries(tmp_path)
        assert open_blend(entries, (99.0, 1.0, 0.0), "test", 4, 1) is None
        assert open_blend(entries, (0.0, 1.0, 0.0), "train", 4, 1) is None

    def test_user_errors(self, tmp_path):
        entries = self.entries(tmp_path)
        (tmp_path / "foreign.bin").write_bytes(b"1234")
        (tmp_path / "foreign.idx").write_bytes(b"1234" * 20)
        for given_entries, split, part, message in [
            (entries, (999.0, 1.0, 0.0), "validation", "leaves the validation part none"),
            (entries, (97.0, 0.0, 3.0), "test", "hold .* tokens, fewer than one sample"),
            (entries, (0.0, 0.0, 0.0), "train", "not three shares"),
            (entries, (1.0, -1.0, 1.0), "train", "not three shares"),
            ([], (1.0, 0.0, 0.0), "train", "names no shard"),
            ([(str(tmp_path / "none"), 1.0)], (1.0, 0.0, 0.0), "train", "missing"),
            ([(str(tmp_path / "foreign"), 1.0)], (1.0, 0.0, 0.0), "train", "not a Megatron index"),
        ]:
            with pytest.raises(UserError, match=message):
                open_blend(given_entries, split, part, 30, 1)

    def test_all_missing_shards_are_named_together(self, tmp_path):
        entries = self.entries(tmp_path)
        entries += [(str(tmp_path / name), 1.0) for name in ("c4", "github")]
        with pytest.raises(UserError, match="names 4 shards, and 2 are not there") as caught:
            open_blend(entries, (1.0, 0.0, 0.0), "train", 4, 1)
        assert f"{tmp_path}/c4, {tmp_path}/github" in str(caught.value)

    def test_deterministic(self, tmp_path):
        entries = self.entries(tmp_path)
        first, second = (open_blend(entries, (1.0, 0.0, 0.0), "train", 8, 5) for _ in range(2))
        for k in (0, 1, 500, 10**7):
            assert first[k].tolist() == second[k].tolist()


def test_blend_of_real_corpora_gives_their_samples(tmp_path):
    write_shard(tmp_path / "a", [10] * 100)
    corpora = [Corpus(tmp_path / "a", bounds, 6, 1) for bounds in ((0, 50), (50, 100))]
    blend = Blend(corpora, [2, 1])
    for k in range(200):
        corpus, sample = blend.locate(k)
        assert blend[k].tolist() == corpora[corpus][sample].tolist()


def test_check_tokenizer(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", ["some text"])
    entries, tokenizers = [], []
    for vocab_size in (400, 500):
        folder = train_json_tokenizer(tmp_path / str(vocab_size), vocab_size)
        prefix = str(tmp_path / f"p{vocab_size}")
        preprocess(PreprocessOptions((str(data),), str(folder), prefix))
        tokenizers.append(load_tokenizer(folder))
        entries.append((f"{prefix}_text_document", 1.0))
    write_shard(tmp_path / "bare", [10])
    bare = (str(tmp_path / "bare"), 1.0)

    check_tokenizer([entries[0], bare], 400, None)
    check_tokenizer([bare, entries[0]], 512, tokenizers[0].identity)
    with pytest.raises(UserError, match=r"vocabulary of 500, the model has model.vocab_size = 499"):
        check_tokenizer([entries[1]], 499, None)
    with pytest.raises(UserError, match="differs from that of"):
        check_tokenizer(entries, 512, None)
    with pytest.raises(UserError, match="differs from the run's tokenizer"):
        check_tokenizer([entries[0]], 512, tokenizers[1].identity)
    path = str(tokenizers[1].path)
    with pytest.raises(UserError, match="differs from the run's tokenizer") as caught:
        check_tokenizer([entries[0]], 512, tokenizers[1].identity, path)
    # The file of the run and that of the shard, the latter as far as its manifest knows it.
    assert f"{path}, SHA-256 {tokenizers[1].identity[:12]}" in caught.value.problem
    assert f"tokenizer.json of SHA-256 {tokenizers[0].identity[:12]}" in caught.value.problem
    assert f"{entries[0][0]}.json" in caught.value.problem
