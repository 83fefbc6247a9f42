"""Parquet, plain text, sub-sources, several keys, BOS, and hostile content, through whole jobs."""

from __future__ import annotations

import json

import pytest

from litespark.data.indexed import IndexedReader
from litespark.data.options import PreprocessOptions
from litespark.data.preprocess import preprocess
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import UserError
from tests.support.data import PARAGRAPHS, train_json_tokenizer, train_sentencepiece, write_jsonl

SETS = ["RedPajamaC4", "RedPajamaBook"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model"))


def run(data, tokenizer, prefix, **changes):
    return preprocess(PreprocessOptions((str(data),), str(tokenizer), str(prefix), **changes))


def texts_of(prefix, tokenizer):
    loaded, reader = load_tokenizer(tokenizer), IndexedReader(prefix)
    return [loaded.decode(reader.read(i).tolist()) for i in range(reader.documents)]


def write_sets(path):
    rows = [{"text": t, "meta": {"redpajama_set_name": SETS[i % 2]}} for i, t in enumerate("abcde")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sub_sources_have_a_shard_each_in_order(tmp_path, tokenizer):
    data = write_sets(tmp_path / "a.jsonl")
    written = run(data, tokenizer, tmp_path / "p", split_by="meta.redpajama_set_name")
    assert sorted(written) == [f"{tmp_path}/p_{name}_text_document" for name in sorted(SETS)]
    assert texts_of(tmp_path / "p_RedPajamaC4_text_document", tokenizer) == ["a", "c", "e"]
    assert texts_of(tmp_path / "p_RedPajamaBook_text_document", tokenizer) == ["b", "d"]
    manifest = written[f"{tmp_path}/p_RedPajamaBook_text_document"]
    assert (manifest.subset, manifest.sources[0].documents) == ("RedPajamaBook", 2)


@pytest.mark.parametrize("meta", ["{}", '{"redpajama_set_name": "../up"}', "null", '"text"'])
def test_a_line_without_a_sub_source_is_a_bad_line(tmp_path, tokenizer, meta):
    data = write_sets(tmp_path / "a.jsonl")
    with open(data, "a") as file:
        file.write(f'{{"text": "x", "meta": {meta}}}\n')
    with pytest.raises(UserError, match=r"a.jsonl:6: there is no name for a file"):
        run(data, tokenizer, tmp_path / "p", split_by="meta.redpajama_set_name")


@pytest.mark.parametrize("form", ["struct", "string"])
def test_parquet_gives_what_json_lines_give(tmp_path, tokenizer, form):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"text": text, "other": 1, "meta": {"redpajama_set_name": SETS[i % 2]}}
        for i, text in enumerate([*PARAGRAPHS[:600], ""])
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if form == "string":
        rows = [row | {"meta": json.dumps(row["meta"])} for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    for name in ("a.jsonl", "a.parquet"):
        run(tmp_path / name, tokenizer, tmp_path / f"{name}.out")
        run(
            tmp_path / name, tokenizer, tmp_path / f"{name}.set", split_by="meta.redpajama_set_name"
        )
    outs = ["out_text", *(f"set_{name}_text" for name in SETS)]
    for out in outs:
        for suffix in (".bin", ".idx"):
            ours = (tmp_path / f"a.parquet.{out}_document{suffix}").read_bytes()
            assert ours == (tmp_path / f"a.jsonl.{out}_document{suffix}").read_bytes()


def test_parquet_faults_are_named(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), data)
    with pytest.raises(UserError, match=r"a.parquet:2: the value of 'text' is null"):
        run(data, tokenizer, tmp_path / "p")
    with pytest.raises(UserError, match=r"no column 'body' \(its columns: text\)"):
        run(data, tokenizer, tmp_path / "p", json_keys=("body",))
    data.write_bytes(data.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read to its end"):
        run(data, tokenizer, tmp_path / "p")


def test_a_text_file_is_one_document(tmp_path, tokenizer):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("two\nlines\n")
    (folder / "b.txt").write_text("")
    (folder / "c.txt").write_bytes(b"\xff\xfe")
    (folder / "d.txt").write_text('{"text": 1}')
    with pytest.raises(UserError, match=r"c.txt:1: the text is not UTF-8"):
        run(folder, tokenizer, tmp_path / "p")
    (manifest,) = run(folder, tokenizer, tmp_path / "p", on_error="skip").values()
    expected = ["two\nlines\n", "", '{"text": 1}']
    assert texts_of(tmp_path / "p_text_document", tokenizer) == expected
    assert (manifest.skipped_bad_lines, manifest.files.empty_documents) == (1, 1)
    write_jsonl(folder / "e.jsonl", ["data"])  # beside data, texts are licences and readmes
    run(folder, tokenizer, tmp_path / "q")
    assert texts_of(tmp_path / "q_text_document", tokenizer) == ["data"]


def test_bos_begins_each_document_that_is_not_empty(tmp_path, tokenizer):
    data = write_jsonl(tmp_path / "a.jsonl", ["one", "", "two"])
    (manifest,) = run(data, tokenizer, tmp_path / "p", prepend_bos=True).values()
    assert manifest.prepend_bos
    reader = IndexedReader(tmp_path / "p_text_document")
    ids = [reader.read(i).tolist() for i in range(3)]
    assert ids[1] == []
    assert all(document[0] == 1 and document[-1] == 2 for document in (ids[0], ids[2]))
    without = train_json_tokenizer(tmp_path / "none", eos=None)
    with pytest.raises(UserError, match="no begin-of-text token"):
        run(data, without, tmp_path / "q", prepend_bos=True, append_eod=False)


def test_fallback_is_said_and_gives_the_references_ids(tmp_path):
    unigram = train_sentencepiece(tmp_path / "unigram", model_type="unigram", vocab_size=500)
    data = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS[:30])
    said = []
    given = PreprocessOptions((str(data),), str(unigram), str(tmp_path / "p"))
    preprocess(given, say=said.append)
    assert len(said) == 1
    assert "the reference tokenizer is used" in said[0]
    reader, loaded = IndexedReader(tmp_path / "p_text_document"), load_tokenizer(unigram)
    assert reader.read(3).tolist() == [*loaded.encode(PARAGRAPHS[3]), loaded.eos_id]


def test_hostile_content_is_kept_or_named(tmp_path, tokenizer):
    huge = ("word " * 20 + "\n") * 1_000_000  # 100 MB in one document
    data = tmp_path / "a.jsonl"
    with open(data, "wb") as file:
        file.write(json.dumps({"text": "a\0b\0"}).encode() + b"\n")
        file.write(json.dumps({"text": huge}).encode() + b"\n")
        file.write(b'{"text": "\xff\xfe"}\n{"text": "a\\ud809b"}\n\0\0\n{"text": "end"}\n')
    (manifest,) = run(data, tokenizer, tmp_path / "p", on_error="skip").values()
    assert (manifest.skipped_bad_lines, manifest.replaced_surrogates) == (2, 1)
    listed = (tmp_path / "p_quarantine.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{data}:3", f"{data}:5"]
    texts = texts_of(tmp_path / "p_text_document", tokenizer)
    assert (texts[0], texts[2], texts[3]) == ("a\0b\0", "a\ufffdb", "end")
    assert texts[1] == huge
