"""`litespark data stats` and `head`: figures that can be counted by hand, text that went in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litespark.cli.main import main
from litespark.data import index_file
from litespark.data.length_chart import terminal_histogram
from litespark.data.preprocess import PreprocessOptions, preprocess
from litespark.data.statistics import count_lengths
from litespark.data.tokenizers import load_tokenizer
from tests.support.data import train_json_tokenizer, write_jsonl, write_shard

TEXTS = {"one": ["some text", "", "more of it, and longer"], "two": ["</s> is \x1b[31mtext"]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    for name, texts in TEXTS.items():
        write_jsonl(folder / "in" / f"{name}.jsonl", texts)
    tokenizer = train_json_tokenizer(folder / "tokenizer")
    train_json_tokenizer(folder / "other", 500)
    preprocess(PreprocessOptions((str(folder / "in"),), str(tokenizer), str(folder / "p")))
    return folder


def run(capsys, *arguments):
    code = main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_stats_as_json_are_the_counts(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "ROWS_AT_ONCE", 7)
    lengths = [0] * 5 + [1] * 10 + [3] * 4 + [200]
    write_shard(tmp_path / "a", lengths)
    write_shard(tmp_path / "b", [3])
    code, out, _ = run(capsys, "stats", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0
    value = json.loads(out)
    first = value["shards"][0]
    assert (first["documents"], first["empty_documents"], first["tokens"]) == (20, 5, 222)
    assert (first["shortest_tokens"], first["longest_tokens"]) == (0, 200)
    assert first["percentiles_tokens"] == {
        str(p): int(np.percentile(lengths, p, method="inverted_cdf"))
        for p in (1, 5, 25, 50, 75, 95, 99)
    }
    bins = [(b["first_tokens"], b["last_tokens"], b["documents"]) for b in first["histogram"]]
    assert bins[:4] == [(0, 0, 5), (1, 1, 10), (2, 3, 4), (4, 7, 0)]
    assert bins[-1] == (128, 255, 1)
    assert first["sources"] == []
    assert (value["total"]["documents"], value["total"]["tokens"]) == (21, 225)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3000), max_size=30), max_size=5), st.data())
def test_counts_of_any_lengths(blocks, data):
    everything = [length for block in blocks for length in block]
    if not everything:
        return
    counts = count_lengths(np.array(block, dtype=np.int64) for block in blocks)
    assert counts.documents == len(everything)
    assert counts.tokens == sum(everything)
    percent = data.draw(st.integers(1, 100))
    expected = np.percentile(everything, percent, method="inverted_cdf")
    assert counts.percentile_tokens(percent) == int(expected)
    for first, last, documents in counts.histogram():
        assert documents == sum(first <= length <= last for length in everything)
    assert sum(documents for _, _, documents in counts.histogram()) == len(everything)


def test_tokens_by_source_add_up(capsys, written):
    prefix = written / "p_text_document"
    tokenizer = load_tokenizer(written / "tokenizer")
    code, out, _ = run(capsys, "stats", prefix, "--json")
    assert code == 0
    shard = json.loads(out)["shards"][0]
    expected = [
        {
            "name": f"in/{name}.jsonl",
            "documents": len(texts),
            "tokens": sum(len(tokenizer.encode(text)) + 1 for text in texts if text),
        }
        for name, texts in TEXTS.items()
    ]
    assert shard["sources"] == expected
    assert sum(source["tokens"] for source in expected) == shard["tokens"]
    code, out, _ = run(capsys, "stats", prefix)
    assert code == 0
    assert f"{expected[0]['tokens']:,}" in out
    assert "in/two.jsonl" in out
    assert "4 (1 empty)" in out


def test_histogram_lines_have_bars_in_proportion():
    counts = count_lengths([np.array([0] + [1] * 40 + [2] * 20 + [9])])
    assert terminal_histogram(counts) == [
        "   0 |█" + " " * 39 + " 1 (1.6%)",
        "   1 |" + "█" * 40 + " 40 (64.5%)",
        " 2-3 |" + "█" * 20 + " " * 20 + " 20 (32.3%)",
        " 4-7 |" + " " * 40 + " 0 (0.0%)",
        "8-15 |█" + " " * 39 + " 1 (1.6%)",
    ]
    assert terminal_histogram(counts, "ascii")[2].startswith(" 2-3 |" + "#" * 20 + " ")


def test_png_is_a_picture(capsys, written, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    prefix = written / "p_text_document"
    assert run(capsys, "stats", prefix, "--png", tmp_path / "lengths.png")[0] == 0
    content = (tmp_path / "lengths.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "lengths.png")
    assert pixels.shape[:2] == (540, 960)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10  # not blank
    code, _, errors = run(capsys, "stats", prefix, "--png", tmp_path / "none" / "lengths.png")
    assert (code, "--png" in errors) == (2, True)


def test_png_without_matplotlib_names_the_extra(capsys, written, monkeypatch):
    monkeypatch.setattr("litespark.data.length_chart.find_spec", lambda name: None)
    code, out, errors = run(capsys, "stats", written / "p_text_document", "--png", "x.png")
    assert (code, out) == (2, "")
    assert "pip install 'litespark[plot]'" in errors


def test_head_gives_the_text_that_went_in(capsys, written):
    prefix, tokenizer = written / "p_text_document", written / "tokenizer"
    code, out, _ = run(
        capsys, "head", prefix, "--tokenizer", tokenizer, "--document", 2, "--count", 9
    )
    assert code == 0
    shown = out.split("--- ")[1:]
    assert len(shown) == 2
    assert shown[0].endswith("the last is the end-of-text token\nmore of it, and longer\n")
    assert shown[0].startswith("document 2: ")
    # A document's control characters do not reach the terminal.
    assert shown[1].endswith("\n</s> is \\x1b[31mtext\n")
    assert "\x1b" not in out
    code, out, _ = run(capsys, "head", prefix, "--tokenizer", tokenizer, "--max-tokens", 2)
    assert code == 0
    length = len(load_tokenizer(tokenizer).encode(TEXTS["one"][0])) + 1
    assert f"[{length - 2} more tokens]" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tokenizer", "other"], "Name the tokenizer that wrote the shard"),
        (["--tokenizer", "tokenizer", "--document", "4"], "is not among the 4 documents"),
        (["--tokenizer", "tokenizer", "--document", "-1"], "is not among the 4 documents"),
        (["--tokenizer", "tokenizer", "--count", "0"], "is below 1"),
    ],
)
def test_head_refuses(capsys, written, arguments, problem):
    arguments[1] = str(written / arguments[1])
    code, out, errors = run(capsys, "head", written / "p_text_document", *arguments)
    assert (code, out) == (2, "")
    assert problem in errors


def test_head_without_a_manifest_refuses_ids_that_the_tokenizer_lacks(capsys, written, tmp_path):
    write_shard(tmp_path / "a", [3000])
    code, out, errors = run(capsys, "head", tmp_path / "a", "--tokenizer", written / "tokenizer")
    assert (code, out) == (2, "")
    assert "holds token ids from 0 to 2,999" in errors


@pytest.mark.parametrize("documents", [-1, 4])
def test_sources_that_do_not_fit_the_shard_are_refused(capsys, written, tmp_path, documents):
    for path in written.glob("p_text_document.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = tmp_path / "p_text_document.json"
    value = json.loads(manifest.read_text())
    value["sources"][0]["documents"] = documents
    manifest.write_text(json.dumps(value))
    code, out, errors = run(capsys, "stats", tmp_path / "p_text_document")
    assert (code, out) == (2, "")
    assert f"{manifest}: gives its sources other documents than the 4" in errors
