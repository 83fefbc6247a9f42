"""Our shards and megatron-core's are the same bytes, and read the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from litespark.data.indexed import IndexedReader, IndexedWriter, token_type

DOCUMENTS = [[5, 6, 7], [], [1], [], [], [499, 0, 2, 2]]


def write_theirs(prefix, documents, vocab_size):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        # As tools/preprocess_data.py of Megatron-LM does: no sequence for an empty document.
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("vocab_size", [500, 65499, 65500, 128256])
@pytest.mark.parametrize(
    "documents",
    [DOCUMENTS, [[3]], [[], [1, 2]], [[1, 2], []]],
    ids=["mixed", "one", "lead", "tail"],
)
def test_files_are_byte_identical(tmp_path, vocab_size, documents):
    documents = [[token * (vocab_size - 1) // 499 for token in doc] for doc in documents]
    write_theirs(tmp_path / "theirs", documents, vocab_size)
    with IndexedWriter(tmp_path / "ours", vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("ours*")) == ["ours.bin", "ours.idx"]


def test_many_documents_cross_the_blocks_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr("litespark.data.indexed.ROWS_AT_ONCE", 7)
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 500, n).tolist() for n in generator.integers(0, 4, 100)]
    write_theirs(tmp_path / "theirs", documents, 500)
    with IndexedWriter(tmp_path / "ours", 500) as writer:
        lengths = [len(document) for document in documents]
        writer.add_documents(np.concatenate(documents).astype(np.int64), lengths)
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()
    reader = IndexedReader(tmp_path / "ours")
    assert [reader.read(i).tolist() for i in range(reader.documents)] == documents


def test_dtype_bound_is_megatrons():
    for vocab_size in (1, 65499, 65500, 65536, 200000):
        assert token_type(vocab_size) is DType.optimal_dtype(vocab_size)


def test_megatron_reads_ours(tmp_path):
    with IndexedWriter(tmp_path / "ours", 500) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [d for d in DOCUMENTS if d]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2, 2, 2, 3]


def test_we_read_megatrons_documents_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for sequence in ([1, 2], [3]):
        builder.add_item(torch.tensor(sequence))
    builder.end_document()
    builder.add_item(torch.tensor([4, 5, 6]))
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    reader = IndexedReader(tmp_path / "theirs")
    assert reader.document_lengths_tokens.tolist() == [3, 3]
    assert [reader.read(i).tolist() for i in range(2)] == [[1, 2, 3], [4, 5, 6]]
