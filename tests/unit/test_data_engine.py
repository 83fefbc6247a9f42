"""The fast engine gives the reference's ids on everything that is known to part tokenizers."""

from __future__ import annotations

import base64
import itertools
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litespark.data import engine as module
from litespark.data.edge_strings import EDGE_STRINGS
from litespark.data.engine import (
    FastEngine,
    FastModel,
    ReferenceEngine,
    cut_at_line_ends,
    encode_texts,
    probe_texts,
)
from litespark.data.indexed import IndexedReader
from litespark.data.options import PreprocessOptions
from litespark.data.preprocess import preprocess
from litespark.data.tokenizers import load_tokenizer
from tests.support.data import (
    PARAGRAPHS,
    make_blocks_small,
    train_json_tokenizer,
    train_sentencepiece,
    write_jsonl,
)

KINDS = ["sentencepiece", "llama_json", "byte_level", "llama3", "tekken"]


def llama_json(folder, model_folder):
    """Write the `tokenizer.json` of a sentencepiece model, with its control tokens."""
    plain = load_tokenizer(model_folder).plain_json()
    assert plain is not None
    value = json.loads(plain)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    value["added_tokens"] = [
        {"id": number, "content": text, "special": True, **flags}
        for number, text in enumerate(["<unk>", "<s>", "</s>"])
    ]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(value), "utf-8")
    return folder


def rank_list(count):
    """Byte strings for a vocabulary of ranks: bytes, frequent words, then combinations."""
    words = [f" {word}".encode() for text in PARAGRAPHS for word in text.split()]
    pieces = [word[:end] for word in words for end in range(2, len(word) + 1)]
    letters = [bytes([byte]) for byte in range(32, 127)]
    combinations = (b"".join(some) for some in itertools.product(letters, repeat=3))
    pairs = (b"".join(some) for some in itertools.product(letters, repeat=2))
    ordered = itertools.chain((bytes([b]) for b in range(256)), pairs, pieces, combinations)
    return list(itertools.islice(dict.fromkeys(ordered), count))


def llama3_file(folder):
    lines = [b"%s %d\n" % (base64.b64encode(p), i) for i, p in enumerate(rank_list(128_000))]
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


def tekken_file(folder):
    marks, upper, lower = r"\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}", r"\p{Ll}"
    start = r"[^\r\n\p{L}\p{N}]?"
    pattern = (
        f"{start}[{upper}{marks}]*[{lower}{marks}]+|{start}[{upper}{marks}]+[{lower}{marks}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    value = {
        "config": {
            "pattern": pattern,
            "default_vocab_size": 3000,
            "default_num_special_tokens": 100,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
            for rank, token in enumerate(rank_list(3500))  # more than the model uses
        ],
    }
    folder.mkdir()
    (folder / "tekken.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    model = train_sentencepiece(folder / "sentencepiece")
    folders = {
        "sentencepiece": model,
        "llama_json": llama_json(folder / "llama_json", model),
        "byte_level": train_json_tokenizer(folder / "byte_level"),
        "llama3": llama3_file(folder / "llama3"),
        "tekken": tekken_file(folder / "tekken"),
    }
    return {kind: load_tokenizer(folders[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def engines(tokenizers):
    """Engines as a job uses them: where the model allows it, cut at line ends."""
    return {
        kind: FastEngine(*cut_at_line_ends(tokenizer.plain_json()))
        for kind, tokenizer in tokenizers.items()
    }


def test_models_of_llamas_kind_are_cut_at_line_ends_and_no_others(tokenizers, tmp_path):
    plain = tokenizers["sentencepiece"].plain_json()
    model = cut_at_line_ends(plain)
    assert model.prefix == b" "
    value = json.loads(model.json)
    (added,) = value["added_tokens"]
    assert (added["content"], added["id"]) == ("\n", value["model"]["vocab"]["<0x0A>"])
    model.save(tmp_path / "model")
    assert FastModel.load(str(tmp_path / "model")) == model
    for kind in ("byte_level", "llama3", "tekken"):
        other = tokenizers[kind].plain_json()
        assert cut_at_line_ends(other) == FastModel(other)
    # A piece that reaches across a line end forbids it.
    value = json.loads(plain)
    value["model"]["vocab"]["a\n"] = len(value["model"]["vocab"])
    across = json.dumps(value).encode()
    assert cut_at_line_ends(across) == FastModel(across)


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_cut_and_uncut_engines_agree_around_line_ends(tmp_path, add_dummy_prefix):
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path, add_dummy_prefix=add_dummy_prefix))
    plain = tokenizer.plain_json()
    assert plain is not None
    cut = cut_at_line_ends(plain)
    assert cut.prefix == (b" " if add_dummy_prefix else b"")
    whole, parted = FastEngine(plain), FastEngine(*cut)
    for letters in itertools.product(["\n", " ", "\u2581", "the", "\r"], repeat=4):
        text = "".join(letters)
        assert fast_ids(parted, text) == fast_ids(whole, text) == tokenizer.encode(text)
    assert fast_ids(parted, "") == []


def reason_against(tokenizer, model, documents):
    """What a job is told of this model, tried on these documents."""
    texts = probe_texts(tokenizer, documents)
    ids = encode_texts(lambda: FastEngine(*model), texts)
    return (
        ids
        if isinstance(ids, str)
        else module.reason_against(texts, ids, [tokenizer.encode(t) for t in texts])
    )


def fast_ids(engine, text):
    return engine.encode(text.encode("utf-8")).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_engine_is_accepted_and_gives_the_ids_of_the_edge_strings(tokenizers, engines, kind):
    tokenizer = tokenizers[kind]
    assert reason_against(tokenizer, FastModel(tokenizer.plain_json()), PARAGRAPHS[:64]) is None
    for text in EDGE_STRINGS:
        assert fast_ids(engines[kind], text) == tokenizer.encode(text), text[:60]


def test_the_edge_strings_are_many_and_of_each_kind():
    joined = "\n".join(EDGE_STRINGS)
    assert len(set(EDGE_STRINGS)) == len(EDGE_STRINGS) >= 87
    for needed in ("\u2581", "\0", "\ufeff", "\u200d", "\ue000", "<0x41>", "</s>", "\u4e2d", "   "):
        assert needed in joined
    assert max(map(len, EDGE_STRINGS)) >= 20_000


# Characters that vocabularies and expressions treat apart come more often than chance has them.
PIECES = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=" \n\t\r\u2581\u00a0", max_size=12),
    st.sampled_from(
        ["<s>", "</s>", "<unk>", "<0x0A>", "the", "'ll", "123", "\U0001f468\u200d", "\0"]
    ),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(pieces=st.lists(PIECES, max_size=8))
def test_engine_equals_the_reference_on_random_unicode(tokenizers, engines, kind, pieces):
    text = "".join(pieces)
    assert fast_ids(engines[kind], text) == tokenizers[kind].encode(text)


def test_control_token_text_is_text(tokenizers, engines):
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        control = {tokenizer.bos_id, tokenizer.eos_id}
        for name in tokenizer.added_tokens:
            ids = fast_ids(engines[kind], f"a{name}b")
            assert not control & set(ids), (kind, name)
            if kind != "llama_json":  # which has no decoder
                assert tokenizer.decode(ids) == f"a{name}b"


def test_a_wrong_engine_is_caught_by_the_users_own_documents(tokenizers, monkeypatch):
    tokenizer = tokenizers["sentencepiece"]
    plain = tokenizer.plain_json()
    monkeypatch.setattr(module, "EDGE_STRINGS", ())
    value = json.loads(plain)
    merges = [merge for merge in value["model"]["merges"] if "".join(merge) != "\u2581the"]
    value["model"]["merges"] = merges
    wrong = FastModel(json.dumps(value).encode())
    assert reason_against(tokenizer, wrong, []) is None
    reason = reason_against(tokenizer, wrong, ["and the rest"])
    assert reason is not None
    assert "and the rest" in reason


@pytest.mark.parametrize("workers", [1, 4])
def test_job_with_a_wrong_engine_is_redone_by_the_reference(
    tokenizers, tmp_path, monkeypatch, workers
):
    """Blocks that the wrong engine was given already are dropped, and none is lost.

    Nor are its ids, which four workers leave in shared memory, taken for the reference's.
    """
    make_blocks_small(monkeypatch)
    tokenizer = tokenizers["sentencepiece"]
    data, said = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS), []
    value = json.loads(tokenizer.plain_json())
    value["model"]["merges"] = value["model"]["merges"][:50]
    wrong = json.dumps(value).encode()
    monkeypatch.setattr(type(tokenizer), "plain_json", lambda self: wrong)
    out = str(tmp_path / "out")
    job = PreprocessOptions((str(data),), str(tokenizer.path), out, workers=workers)
    preprocess(job, say=said.append)
    assert "gigatoken gives other ids than the reference" in said[0]
    reader = IndexedReader(tmp_path / "out_text_document")
    ids = [reader.read(i).tolist() for i in range(reader.documents)]
    assert ids == [[*tokenizer.encode(text), tokenizer.eos_id] for text in PARAGRAPHS]


def test_models_that_the_engine_cannot_read_are_left_to_the_reference(tmp_path):
    unigram = load_tokenizer(train_sentencepiece(tmp_path, model_type="unigram", vocab_size=500))
    assert unigram.plain_json() is None
    data, said = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS[:5]), []
    job = PreprocessOptions((str(data),), str(unigram.path), str(tmp_path / "out"))
    preprocess(job, say=said.append)
    assert "does not know" in said[0]
    reader = IndexedReader(tmp_path / "out_text_document")
    assert reader.read(0).tolist() == [*unigram.encode(PARAGRAPHS[0]), unigram.eos_id]
    assert "cannot read" in str(reason_against(unigram, FastModel(b'{"model": {}}'), []))
    text = PARAGRAPHS[0]
    ids = ReferenceEngine(unigram).encode(text.encode())
    assert ids.tolist() == unigram.encode(text)


def test_engine_forgets_its_words_and_stays_exact(tokenizers, monkeypatch):
    tokenizer = tokenizers["sentencepiece"]
    monkeypatch.setattr(module, "CACHE_BYTES", -1)  # any memory is too much: it loads each time
    engine = FastEngine(tokenizer.plain_json())
    for text in PARAGRAPHS[:20]:
        first = engine._tokenizer
        assert fast_ids(engine, text) == tokenizer.encode(text)
        engine.trim()
        assert engine._tokenizer is not first
    monkeypatch.setattr(module, "CACHE_BYTES", 1 << 40)
    engine = FastEngine(tokenizer.plain_json())
    first = engine._tokenizer
    engine.trim()
    assert engine._tokenizer is first


class TestTiktokenFiles:
    """Ids are ranks, moved up by the control tokens that come first."""

    def test_llama3(self, tokenizers):
        tokenizer = tokenizers["llama3"]
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (
            128256,
            128000,
            128001,
        )
        text = "Hello world, it's 12345\n\n  of na\u00efve text"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([128000, *tokenizer.encode("a"), 128001]) == "a"
        # Digits are cut in threes by the expression, whatever the ranks hold.
        assert tokenizer.encode("12345") == [*tokenizer.encode("123"), *tokenizer.encode("45")]

    def test_tekken_ids_start_after_its_control_tokens(self, tokenizers):
        tokenizer = tokenizers["tekken"]
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (3000, 1, 2)
        ids = tokenizer.encode("some of it")
        assert min(ids) >= 100
        assert max(ids) < 3000
        assert tokenizer.decode([1, *ids, 2]) == "some of it"


def test_without_gigatoken_the_reference_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    reason = encode_texts(lambda: FastEngine(b"{}"), ["text"])
    assert "gigatoken cannot be imported" in str(reason)
