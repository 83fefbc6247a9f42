"""Merged shards are what one job would have written; nothing half-merged is ever left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from litespark.cli.main import main
from litespark.data import merge as merge_module
from litespark.data.indexed import IndexedReader, IndexedWriter
from litespark.data.manifest import manifest_path, read_manifest
from litespark.data.merge import merge_shards
from litespark.data.preprocess import PreprocessOptions, preprocess
from litespark.errors import LitesparkError, UserError
from tests.support.cli import PATIENCE_SECONDS, ROOT, environment
from tests.support.data import PARAGRAPHS, train_json_tokenizer, write_jsonl, write_shard

PARTS = {"a": PARAGRAPHS[:40], "b": ["", *PARAGRAPHS[40:45], ""], "c": PARAGRAPHS[45:90]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Shards a, b, c; `whole`, written from the three files at once; another tokenizer's shard."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = train_json_tokenizer(folder / "tokenizer")
    files = [str(write_jsonl(folder / f"{name}.jsonl", texts)) for name, texts in PARTS.items()]
    for name, file in zip(PARTS, files, strict=True):
        preprocess(PreprocessOptions((file,), str(tokenizer), str(folder / name)))
    preprocess(PreprocessOptions(tuple(files), str(tokenizer), str(folder / "whole")))
    other = train_json_tokenizer(folder / "other_tokenizer", 500)
    preprocess(PreprocessOptions((files[0],), str(other), str(folder / "foreign")))
    preprocess(
        PreprocessOptions((files[0],), str(tokenizer), str(folder / "bare"), append_eod=False)
    )
    return folder


def prefixes(folder, names="abc"):
    return [str(folder / f"{name}_text_document") for name in names]


def merge(*arguments):
    return main(["data", "merge", *map(str, arguments)])


def files_of(prefix):
    return {s: (prefix.parent / f"{prefix.name}{s}").read_bytes() for s in (".bin", ".idx")}


@pytest.mark.parametrize("rows", [2, 1 << 18], ids=["small blocks", "usual blocks"])
def test_merged_bytes_are_those_of_one_job(written, tmp_path, capsys, monkeypatch, rows):
    monkeypatch.setattr(merge_module, "ROWS_AT_ONCE", rows)
    out = tmp_path / "new" / "all"
    assert merge("--input", *prefixes(written), "--output-prefix", out) == 0
    whole = written / "whole_text_document"
    assert files_of(out) == files_of(whole)
    expected, found = read_manifest(whole), read_manifest(out)
    assert found is not None
    assert found == expected
    assert f"{found.files.tokens:,} ({found.files.bin_bytes:,} bytes)" in capsys.readouterr().out
    assert main(["data", "verify", str(out)]) == 0


def test_document_indices_of_several_sequences_are_those_of_megatron(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, sequences in (("a", [3, 2]), ("b", [1, 4])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        builder.add_document(torch.arange(sum(sequences)), sequences)
        builder.add_document(torch.arange(7), [7])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for name in "ab":
        theirs.add_index(str(tmp_path / name))
    theirs.finalize(str(tmp_path / "theirs.idx"))
    merged = merge_shards([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "ours"))
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "theirs")
    assert merged.manifest is None
    assert IndexedReader(tmp_path / "ours").document_lengths_tokens.tolist() == [5, 7, 5, 7]


def test_megatrons_flags_take_a_folder(written, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in "abc":
        for path in written.glob(f"{name}_text_document.*"):
            (shards / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "tools/merge_datasets.py", "--input", str(shards)]
    command += ["--output-prefix", str(tmp_path / "all")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "all") == files_of(written / "whole_text_document")
    (shards / "b_text_document.idx").unlink()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 2
    assert "lacks b_text_document.idx" in done.stderr


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("a", "foreign"), "was written with the tokenizer of SHA-256"),
        (("a", "bare"), "and without end-of-text tokens, "),
        (("a", "b", "a"), "is named twice"),
        (("a", "nowhere"), "is missing"),
    ],
)
def test_shards_that_do_not_go_together_are_refused(written, tmp_path, capsys, names, problem):
    assert merge("--input", *prefixes(written, names), "--output-prefix", tmp_path / "x") == 2
    errors = capsys.readouterr().err
    assert problem in errors
    assert prefixes(written, names)[-1] in errors
    assert list(tmp_path.iterdir()) == []


def test_token_types_that_differ_are_refused(tmp_path):
    write_shard(tmp_path / "a", [5])
    write_shard(tmp_path / "b", [5], vocab_size=100_000)
    with pytest.raises(UserError, match=r"holds int32 tokens, .*a holds uint16"):
        merge_shards([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_damaged_input_is_not_given_a_new_checksum(written, tmp_path, suffix):
    for path in written.glob("a_text_document.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / f"a_text_document{suffix}"
    content = bytearray(damaged.read_bytes())
    content[-8 if suffix == ".bin" else 60] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"not those that|corrupt") as caught:
        merge_shards(
            [*prefixes(written, "b"), str(tmp_path / "a_text_document")], str(tmp_path / "out")
        )
    assert caught.value.where == str(damaged)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))


def test_existing_output_is_kept(written, tmp_path):
    (tmp_path / "out.bin").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        merge_shards(prefixes(written), str(tmp_path / "out"))
    assert (tmp_path / "out.bin").read_text() == "precious"


def test_shard_without_tokens_and_shard_without_manifest_are_merged(written, tmp_path):
    write_shard(tmp_path / "empty", [0, 0], vocab_size=600)
    inputs = [prefixes(written, "a")[0], str(tmp_path / "empty")]
    merged = merge_shards(inputs, str(tmp_path / "out"))
    assert merged.manifest is None
    assert not manifest_path(tmp_path / "out").exists()
    assert merged.files.documents == len(PARTS["a"]) + 2
    assert merged.files.empty_documents == 2


def test_full_disk_leaves_nothing(written, tmp_path, monkeypatch):
    def refuse(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("litespark.utils.files.HashingFile.write", refuse)
    with pytest.raises(LitesparkError, match="No space left"):
        merge_shards(prefixes(written), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_merge_leaves_nothing(tmp_path, number):
    """A sparse input of 8 GB takes seconds to copy; the signal comes while the copy grows."""
    with IndexedWriter(tmp_path / "big", 100) as writer:
        writer.add_documents(np.zeros(1 << 20, dtype=np.uint16), [1 << 20])
    _make_sparse(tmp_path / "big", 1 << 30, 4)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "litespark", "data", "merge", "--input", tmp_path / "big"]
    process = subprocess.Popen(
        [*command, "--output-prefix", out / "all"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(path.stat().st_size for path in out.iterdir()):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == (130 if number == signal.SIGINT else 143), errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []


def _make_sparse(prefix, tokens_each, documents):
    """Let the index describe `documents` documents of zeros, of which no byte is on the disk."""
    from litespark.data.index_file import pack_header

    with open(f"{prefix}.idx", "wb") as file:
        file.write(pack_header(np.dtype(np.uint16), documents, documents + 1))
        file.write(np.full(documents, tokens_each, "<i4").tobytes())
        file.write((np.arange(documents, dtype="<i8") * 2 * tokens_each).tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens_each * documents)


def test_shards_are_not_merged_into_a_store(written, capsys):
    assert merge("--input", *prefixes(written, ("a", "b")), "--output-prefix", "s3://b/x") == 2
    assert "in a store" in capsys.readouterr().err
