"""Tokenizers agree with their libraries, and document text never becomes a control token."""

from __future__ import annotations

import hashlib
import json

import pytest
import sentencepiece
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from litespark.data.tokenizers import load_tokenizer
from litespark.errors import UserError
from tests.support.data import PARAGRAPHS, train_json_tokenizer, train_sentencepiece

CONTROL_TEXT = "a</s>b <s> <unk> <0x41> </s>"


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    return train_json_tokenizer(tmp_path_factory.mktemp("json"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model"))


def copy_json(json_folder, tmp_path, **companions):
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    for name, value in companions.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def test_json_ids_are_the_librarys(json_folder):
    reference = LibraryTokenizer.from_file(str(json_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(json_folder)
    texts = [*PARAGRAPHS[:50], "", " ", "ä\U0001f600\0"]
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


def test_sentencepiece_ids_are_the_librarys(model_folder):
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(model_folder / "tokenizer.model")
    )
    tokenizer = load_tokenizer(model_folder / "tokenizer.model")
    texts = [*PARAGRAPHS[:50], "", " ", "ä\U0001f600"]
    expected = [reference.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.decode(expected[0]) == texts[0]


@pytest.mark.parametrize("kind", ["json", "model"])
def test_control_token_text_stays_text(kind, json_folder, model_folder):
    tokenizer = load_tokenizer(json_folder if kind == "json" else model_folder)
    ids = tokenizer.encode(CONTROL_TEXT)
    assert tokenizer.eos_id not in ids
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == CONTROL_TEXT


def test_the_library_alone_would_take_control_text_for_a_token(json_folder):
    reference = LibraryTokenizer.from_file(str(json_folder / "tokenizer.json"))
    assert 1 in reference.encode(CONTROL_TEXT, add_special_tokens=False).ids


def test_attributes(json_folder, model_folder):
    for folder, name in ((json_folder, "tokenizer.json"), (model_folder, "tokenizer.model")):
        tokenizer = load_tokenizer(folder)
        content = (folder / name).read_bytes()
        assert tokenizer.identity == hashlib.sha256(content).hexdigest()
        assert tokenizer.path == folder / name
        assert tokenizer.files == (folder / name,)
    assert (load_tokenizer(json_folder).bos_id, load_tokenizer(json_folder).eos_id) == (0, 1)
    assert (load_tokenizer(model_folder).bos_id, load_tokenizer(model_folder).eos_id) == (1, 2)
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(model_folder / "tokenizer.model")
    )
    assert load_tokenizer(model_folder).vocab_size == reference.vocab_size()


def test_vocab_size_counts_added_tokens_by_their_largest_id(json_folder, tmp_path):
    library = LibraryTokenizer.from_file(str(json_folder / "tokenizer.json"))
    before = library.get_vocab_size()
    library.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == before + 1


def test_vocab_size_of_a_model_counts_added_tokens(model_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((model_folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 40000}))
    assert load_tokenizer(tmp_path).vocab_size == 40001


def test_eos_is_taken_from_the_files_beside(json_folder, tmp_path):
    config = {"eos_token": {"content": "<s>", "__type": "AddedToken"}, "bos_token": None}
    tokenizer = load_tokenizer(
        copy_json(
            json_folder, tmp_path, tokenizer_config=config, special_tokens_map={"bos_token": "</s>"}
        )
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    assert [f.name for f in tokenizer.files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]


def change_json(folder, target, change):
    value = json.loads((folder / "tokenizer.json").read_text())
    change(value)
    (target / "tokenizer.json").write_text(json.dumps(value))
    return target


def add_token(token_id):
    def change(value):
        token = value["added_tokens"][0] | {"content": "<extra>", "id": token_id}
        value["added_tokens"].append(token)

    return change


def test_sizes_and_control_tokens_do_not_wait_for_the_library(json_folder, tmp_path):
    library = LibraryTokenizer.from_file(str(json_folder / "tokenizer.json"))
    size = library.get_vocab_size()
    plain = load_tokenizer(json_folder)
    grown = load_tokenizer(change_json(json_folder, tmp_path, add_token(size)))
    assert (plain.vocab_size, grown.vocab_size) == (size, size + 1)
    assert plain.eos_id == library.token_to_id("</s>")
    assert grown.added_tokens == (*plain.added_tokens, "<extra>")
    assert plain.added_tokens == ("<s>", "</s>")
    assert not any("_library" in vars(tokenizer) for tokenizer in (plain, grown))
    assert plain.encode("a b c") == library.encode("a b c", add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        add_token(100_000),  # the library gives it the next free id instead
        lambda value: value["added_tokens"][0].update(id=77),
        lambda value: value["model"].update(type="Unigram", vocab=[["<unk>", 0.0], ["a", -1.0]]),
    ],
    ids=["a gap", "another id", "a list of scores"],
)
def test_ids_that_the_file_does_not_settle_are_the_librarys(json_folder, tmp_path, change):
    folder = change_json(json_folder, tmp_path, change)
    try:
        library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:
        with pytest.raises(UserError, match="is not a tokenizer"):
            load_tokenizer(folder)
        return
    found = load_tokenizer(folder)
    assert found.vocab_size == max(library.get_vocab(with_added_tokens=True).values()) + 1
    decoder = library.get_added_tokens_decoder()
    assert sorted(found.added_tokens) == sorted(token.content for token in decoder.values())


def test_a_vocabulary_without_a_model_is_refused_at_the_first_text(json_folder, tmp_path):
    folder = change_json(json_folder, tmp_path, lambda value: value["model"].update(merges=[1]))
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(folder).encode("a")


def test_eos_that_the_vocabulary_lacks_is_an_error(json_folder, tmp_path):
    folder = copy_json(json_folder, tmp_path, tokenizer_config={"eos_token": "<|none|>"})
    with pytest.raises(UserError, match="lacks"):
        load_tokenizer(folder)


def test_no_control_tokens_give_none(tmp_path):
    tokenizer = load_tokenizer(train_json_tokenizer(tmp_path, eos=None))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_truncation_and_padding_asked_for_by_the_file_are_off(json_folder, tmp_path):
    library = LibraryTokenizer.from_file(str(json_folder / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=4)
    library.save(str(tmp_path / "tokenizer.json"))
    text = PARAGRAPHS[3]
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(json_folder).encode(text)
    assert load_tokenizer(tmp_path).encode("") == []


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format, as Llama 3's
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "a.txt").write_text("x")
    for name, message in [
        ("none", "no such file"),
        ("empty", "holds none of"),
        ("tokenizer.model", "lacks some of the 256 bytes"),
        ("tokenizer.json", "not a tokenizer.json"),
        ("a.txt", "suffix"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / name)
