"""The word cache gives exactly the tokenizer's ids, and stands aside where it could not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers

from litespark.data import word_cache
from litespark.data.tokenizers import load_tokenizer
from litespark.data.word_cache import json_can_be_cut, pieces_can_be_cut, sentencepiece_can_be_cut
from tests.support.data import PARAGRAPHS, train_json_tokenizer, train_sentencepiece

# Words of the training text beside what cuts go wrong at: runs of spaces, newlines, digits, marks,
# accents that join a letter, other scripts, control characters and literal space marks.
FRAGMENTS = st.one_of(
    st.sampled_from(sorted({word for text in PARAGRAPHS[:80] for word in text.split()})),
    st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "\r\n", "é", "e\u0301", "字", "字 字", "2024"]),
    st.sampled_from(
        ["(", ").", "...", "'s", "_x", "<s>", "</s>", "<0x41>", "\u2581", "\0", "\xa0"]
    ),
    st.text(max_size=4),
)
TEXTS = st.lists(FRAGMENTS, max_size=25).map("".join)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model"), vocab_size=1500)


@pytest.fixture(scope="module")
def llama_json(model_folder):
    """The same vocabulary as a tokenizer.json, converted as transformers does for Llama."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.Load(str(model_folder / "tokenizer.model"))
    pieces = [processor.IdToPiece(i) for i in range(processor.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        if not piece.startswith("<")
        for i in range(1, len(piece))
        if piece[:i] in ids and piece[i:] in ids
    ]
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = LibraryTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path = model_folder.parent / "llama-tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module", params=["sentencepiece", "json"])
def tokenizer(request, model_folder, llama_json):
    loaded = load_tokenizer(model_folder if request.param == "sentencepiece" else llama_json)
    assert loaded._word_cache is not None  # else nothing is tested here
    return loaded


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text="  x  ")
@example(text="\n")
@example(text=" \n a")
@example(text="x" * 3000)
@example(text=" " * 300 + "1")
def test_ids_are_those_of_the_library(tokenizer, text):
    (ids,) = tokenizer.encode_arrays([text])
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(text)


def test_ids_are_those_of_the_library_on_real_text(tokenizer):
    arrays = tokenizer.encode_arrays(PARAGRAPHS)
    assert [ids.tolist() for ids in arrays] == tokenizer.encode_batch(PARAGRAPHS)


def test_each_word_is_tokenized_once_and_the_cache_is_bounded(model_folder, monkeypatch):
    processor = sentencepiece.SentencePieceProcessor()
    processor.Load(str(model_folder / "tokenizer.model"))
    asked = []

    def encode(text):
        asked.append(text)
        return processor.EncodeAsIds(text)

    cache = word_cache.WordCache(encode)
    asked.clear()
    cache.encode("the cat the cat the cat")
    assert asked == ["\n the", "\n cat"]
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 3)
    cache.encode("a dog and a cow and a hen")
    assert len(cache._words) == 3
    assert cache.encode("a dog and a cow").tolist() == processor.EncodeAsIds("a dog and a cow")


@pytest.mark.parametrize(
    "piece",
    [
        "a\u2581",
        "of\u2581the",
        "\u2581\n",
        "\n\n",
        "\n\u2581",
        "10",
        "\u25811",
        "x1",
        "s'",
        "(a",
        "a b",
    ],
)
def test_a_piece_across_a_cut_is_noticed(piece):
    assert pieces_can_be_cut(["\u2581the", "\u2581\u2581", "\n", "1", "().", "\u2581(", "é."])
    assert not pieces_can_be_cut(["\u2581the", piece])


@pytest.mark.parametrize(
    "options",
    [
        {"split_digits": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"model_type": "unigram"},
        {"user_defined_symbols": ["<sep>"]},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=str,
)
def test_models_of_another_type_go_the_ordinary_way(tmp_path, options):
    folder = train_sentencepiece(tmp_path, **options)
    assert not sentencepiece_can_be_cut((folder / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(folder)
    text = PARAGRAPHS[5] + " 2024  <sep> \u00bd x"
    assert tokenizer.encode_arrays([text])[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["model"].update(byte_fallback=False),
        lambda v: v["model"].update(ignore_merges=True),
        lambda v: v["model"].update(dropout=0.1),
        lambda v: v["normalizer"]["normalizers"].pop(0),
        lambda v: v.update(pre_tokenizer={"type": "Whitespace"}),
        lambda v: v["added_tokens"][0].update(special=False),
        lambda v: v["model"]["vocab"].update({"of\u2581the": 9999}),
        lambda v: v["model"]["vocab"].pop("<0x00>"),
    ],
)
def test_json_of_another_type_goes_the_ordinary_way(llama_json, change):
    value = json.loads(llama_json.read_text())
    assert json_can_be_cut(json.dumps(value).encode())
    change(value)
    assert not json_can_be_cut(json.dumps(value).encode())


def test_byte_level_bpe_goes_the_ordinary_way(tmp_path):
    tokenizer = load_tokenizer(train_json_tokenizer(tmp_path))
    assert tokenizer._word_cache is None
    arrays = tokenizer.encode_arrays(PARAGRAPHS[:20])
    assert [ids.tolist() for ids in arrays] == tokenizer.encode_batch(PARAGRAPHS[:20])


def test_content_that_is_no_model_is_not_cut():
    for content in (b"", b"\xff" * 40, b"\x0a\xff\x01abc", b"plain text"):
        assert not sentencepiece_can_be_cut(content)
