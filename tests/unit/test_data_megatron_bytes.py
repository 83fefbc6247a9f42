"""Shards are, byte for byte, what Megatron-LM's own classes write for the same documents."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer as LibraryTokenizer

from litespark.data.preprocess import PreprocessOptions, preprocess
from litespark.data.tokenizers import load_tokenizer
from tests.support.data import PARAGRAPHS, train_json_tokenizer, train_sentencepiece, write_jsonl

indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

# Real English, with an empty document first, in the middle and last.
TEXTS = ["", *PARAGRAPHS[:150], "", "na\u00efve \u4e2d\u6587 \U0001f468\u200d\n\n\tx", ""]
CONTROL = "it ends with </s> in the middle"


def write_as_megatron(prefix, documents, eos_id, vocab_size):
    """What tools/preprocess_data.py does with the ids of each document (--append-eod)."""
    dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        lengths = [len(ids) + 1] if ids else []
        builder.add_document(torch.tensor([*ids, eos_id] if ids else [], dtype=torch.int), lengths)
    builder.finalize(f"{prefix}.idx")


def write_as_litespark(tmp_path, tokenizer, texts):
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    preprocess(PreprocessOptions((str(data),), str(tokenizer), str(tmp_path / "ours"), workers=2))
    return tmp_path / "ours_text_document"


def files(prefix):
    return [prefix.with_name(f"{prefix.name}.{kind}").read_bytes() for kind in ("bin", "idx")]


def large_vocabulary(folder, size=70_000):
    """A byte-level model whose ids need 4 bytes, as those of Llama 3."""
    file = train_json_tokenizer(folder) / "tokenizer.json"
    value = json.loads(file.read_text("utf-8"))
    vocab = value["model"]["vocab"]
    vocab |= {f"unused{number}": number for number in range(len(vocab), size)}
    file.write_text(json.dumps(value), "utf-8")
    return folder


@pytest.mark.parametrize("make", [train_json_tokenizer, large_vocabulary])
def test_text_without_control_tokens_gives_the_same_bytes_as_hf(tmp_path, make):
    folder = make(tmp_path / "tokenizer")
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    documents = [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
    size = load_tokenizer(folder).vocab_size
    write_as_megatron(tmp_path / "theirs", documents, library.token_to_id("</s>"), size)
    ours = write_as_litespark(tmp_path, folder, TEXTS)
    assert files(ours) == files(tmp_path / "theirs")
    assert (tmp_path / "theirs.idx").read_bytes()[17] == (8 if make is train_json_tokenizer else 4)


def test_text_gives_the_same_bytes_as_sentencepiece(tmp_path):
    folder = train_sentencepiece(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id is not None
    documents = [tokenizer.encode(text) for text in [*TEXTS, CONTROL]]
    write_as_megatron(tmp_path / "theirs", documents, tokenizer.eos_id, tokenizer.vocab_size)
    ours = write_as_litespark(tmp_path, folder, [*TEXTS, CONTROL])
    assert files(ours) == files(tmp_path / "theirs")


def test_only_the_text_of_a_control_token_differs_from_hf(tmp_path):
    """There `</s>` in a document becomes the control token; here it stays text."""
    folder = train_json_tokenizer(tmp_path / "tokenizer")
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    eos_id, size = library.token_to_id("</s>"), library.get_vocab_size()
    texts = [*TEXTS, CONTROL, *TEXTS]
    ours = files(write_as_litespark(tmp_path, folder, texts))
    for is_text in (False, True):
        library.encode_special_tokens = is_text
        documents = [library.encode(text, add_special_tokens=False).ids for text in texts]
        assert (eos_id in documents[len(TEXTS)]) is not is_text
        prefix = tmp_path / f"theirs{is_text}"
        write_as_megatron(prefix, documents, eos_id, size)
        assert (ours == files(prefix)) is is_text
