"""The sample index is the order of the corpus, whole or absent, built once, and never needed."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from litespark.cli.main import main
from litespark.data import sample_index
from litespark.data.blend import Blend, open_blend
from litespark.data.corpus import Corpus, PackedCorpus
from litespark.data.loader import BatchLoader
from litespark.data.sample_index import IndexCache, OrderRequest
from tests.support.data import write_shard

LENGTHS = [5, 0, 17, 3, 40, 9, 0, 1] * 30


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write_shard(tmp_path / "a", LENGTHS)
    return str(tmp_path / "a")


def corpus_of(prefix, cache=None, seed=1, kind=Corpus):
    return kind(prefix, (3, len(LENGTHS)), 6, seed, cache)


def samples_of(corpus, count=700):
    return [corpus[k].tolist() for k in range(count)]


def index_files(folder):
    return sorted(folder.glob("*.npy"))


def refuse_to_build(monkeypatch):
    def fail(self):
        raise AssertionError("built again")

    monkeypatch.setattr(OrderRequest, "build", fail)


@pytest.mark.parametrize("kind", [Corpus, PackedCorpus])
def test_samples_are_those_without_an_index_and_it_is_built_once(
    kind, prefix, tmp_path, monkeypatch
):
    expected = samples_of(corpus_of(prefix, kind=kind))
    assert samples_of(corpus_of(prefix, IndexCache(), kind=kind)) == expected
    files = index_files(tmp_path / "a_index")
    assert len(files) == 1 + 699 // corpus_of(prefix, kind=kind).samples_per_epoch
    assert sorted(os.listdir(tmp_path / "a_index")) == [file.name for file in files]
    refuse_to_build(monkeypatch)
    assert samples_of(corpus_of(prefix, IndexCache(), kind=kind)) == expected
    order = corpus_of(prefix, IndexCache(), kind=kind)._epoch(0)
    buffer = order.documents.base.base
    assert isinstance(buffer.obj if isinstance(buffer, memoryview) else buffer, mmap.mmap)
    assert not order.documents.flags.writeable


def test_file_is_one_that_numpy_loads(prefix, tmp_path):
    request = corpus_of(prefix).order_request(0)
    found = IndexCache(str(tmp_path / "index")).find(request)
    words = np.load(found.path, mmap_mode="r", allow_pickle=False)
    assert words.dtype == np.int64
    order = request.build()
    tables = np.concatenate([order.documents, order.ends_tokens, order.samples])
    assert words[16:].tolist() == tables.tolist()


def test_each_thing_that_the_order_depends_on_has_its_own_file(prefix, tmp_path):
    folder = tmp_path / "index"
    write_shard(tmp_path / "other", [*LENGTHS[:-1], 2])
    for number, corpus in enumerate(
        [
            corpus_of(prefix),
            corpus_of(prefix, seed=2),
            corpus_of(prefix, kind=PackedCorpus),
            Corpus(prefix, (3, len(LENGTHS)), 7, 1),
            Corpus(prefix, (2, len(LENGTHS)), 6, 1),
            corpus_of(str(tmp_path / "other")),
        ]
    ):
        assert IndexCache(str(folder)).find(corpus.order_request(0)).how == "built"
        assert len(index_files(folder)) == number + 1
    # The shard is written again under its name: its old index is not taken for the new one's.
    write_shard(tmp_path / "a", [*LENGTHS[:-2], 1, 0])
    assert IndexCache(str(folder)).find(corpus_of(prefix).order_request(0)).how == "built"


def test_copied_shard_keeps_its_index(prefix, tmp_path):
    cache = IndexCache(str(tmp_path / "index"))
    cache.find(corpus_of(prefix).order_request(0))
    (tmp_path / "copy").mkdir()
    for suffix in (".bin", ".idx"):
        content = (tmp_path / f"a{suffix}").read_bytes()
        (tmp_path / "copy" / f"a{suffix}").write_bytes(content)
    assert cache.find(corpus_of(str(tmp_path / "copy" / "a")).order_request(0)).how == "found"


def cut(content):
    return content[:-8]


def lengthen(content):
    return content + b"12345678"


def flip(byte):
    def damage(content):
        changed = bytearray(content)
        changed[byte] ^= 1
        return bytes(changed)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lengthen,
        lambda _: b"",
        lambda content: bytes(len(content)),
        flip(12),
        flip(150),
        flip(-40),
    ],
    ids=["cut", "longer", "empty", "zeros", "npy header", "own header", "table"],
)
def test_damaged_file_is_built_again_with_one_line(prefix, tmp_path, caplog, damage):
    expected = samples_of(corpus_of(prefix), 20)
    samples_of(corpus_of(prefix, IndexCache()), 20)
    (file,) = index_files(tmp_path / "a_index")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.INFO):
        assert samples_of(corpus_of(prefix, IndexCache()), 20) == expected
    assert len(caplog.records) == 1
    assert str(file) in caplog.text
    assert "it is built again" in caplog.text
    assert file.read_bytes() == whole


class Hostile:
    """Makes a folder when it is unpickled, as `numpy.load(..., allow_pickle=True)` would."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_a_hostile_index_runs_nothing_and_is_built_again(prefix, tmp_path, caplog):
    """An array of objects is a pickle; one of the right length, under the right name."""
    request, trace = corpus_of(prefix).order_request(0), tmp_path / "trace"
    cache = IndexCache(str(tmp_path / "index"))
    path = cache.find(request).path
    size_bytes = path.stat().st_size
    array = np.empty(1, dtype=object)
    array[0] = Hostile(trace)
    np.save(path, array, allow_pickle=True)
    path.write_bytes(path.read_bytes().ljust(size_bytes, b"\0"))
    assert cache.find(request).how == "built"
    assert "is built again" in caplog.text
    assert not trace.exists()
    array = np.load(path, allow_pickle=False)
    assert array.dtype == np.int64


def test_unwritable_folder_gives_the_next_one_and_then_memory(prefix, tmp_path, caplog):
    expected = samples_of(corpus_of(prefix))
    (tmp_path / "a_index").write_text("in the way")  # root may write to a folder without its bit
    assert samples_of(corpus_of(prefix, IndexCache())) == expected
    assert index_files(tmp_path / "home" / "litespark" / "index")
    assert not caplog.records
    cache = IndexCache(str(tmp_path / "a_index"))
    assert samples_of(corpus_of(prefix, cache)) == expected
    assert len(caplog.records) == 1
    assert "built in memory" in caplog.text


def test_full_disk_gives_memory_and_leaves_nothing(prefix, tmp_path, caplog, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    cache = IndexCache(str(tmp_path / "index"))
    assert samples_of(corpus_of(prefix, cache), 20) == samples_of(corpus_of(prefix), 20)
    assert "No space left" in caplog.text
    assert os.listdir(tmp_path / "index") == []


def test_who_waits_too_long_builds_in_memory(prefix, tmp_path, caplog, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(sample_index, "PATIENCE_SECONDS", 0.1)
    request = corpus_of(prefix).order_request(0)
    (tmp_path / "index").mkdir()
    name = request.file_name(request.key())
    with open(tmp_path / "index" / f".{name}.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = IndexCache(str(tmp_path / "index")).find(request)
    assert found.path is None
    assert "does not end" in caplog.text


# Builds slowly and says so; then tells how it came by the index.
CHILD = """
import sys, time
from litespark.data.corpus import Corpus, PackedCorpus
from litespark.data.sample_index import IndexCache, OrderRequest
prefix, documents, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
build = OrderRequest.build
def slow(self):
    print("building", flush=True)
    time.sleep(delay)
    return build(self)
OrderRequest.build = slow
print(IndexCache().find(Corpus(prefix, (3, documents), 6, 1).order_request(0)).how)
"""


def start_child(prefix, delay):
    command = [sys.executable, "-c", CHILD, prefix, str(len(LENGTHS)), str(delay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_builds_and_the_others_wait(prefix):
    children = [start_child(prefix, 1.0) for _ in range(3)]
    outputs = sorted(child.communicate(timeout=60)[0].split() for child in children)
    assert outputs == [["building", "built"], ["found"], ["found"]]


def test_killed_builder_leaves_no_index_and_the_next_one_builds(prefix, tmp_path):
    child = start_child(prefix, 60)
    assert child.stdout.readline() == "building\n"
    waiting = start_child(prefix, 0)
    time.sleep(0.3)
    request = corpus_of(prefix).order_request(0)
    folder = tmp_path / "a_index"
    # As it stands when the process is killed while it writes.
    (folder / f".{request.file_name(request.key())}.{child.pid}.12345678.tmp").write_bytes(b"half")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert waiting.communicate(timeout=60)[0].split() == ["building", "built"]
    assert os.listdir(folder) == [request.file_name(request.key())]


def test_resume_in_an_epoch_at_another_layout_sees_the_same_samples(prefix, tmp_path):
    """A run at data parallel 2 x micro-batch 1 stops in epoch 1 and goes on at 1 x 4."""
    write_shard(tmp_path / "b", [9] * 40)
    entries, split = [(prefix, 3.0), (str(tmp_path / "b"), 1.0)], (1.0, 0.0, 0.0)

    def steps(cache, layout, consumed, number):
        micro, ranks = layout
        blend = open_blend(entries, split, "train", 8, 3, cache)
        loaders = [BatchLoader(blend, micro, 8, rank, ranks, consumed) for rank in range(ranks)]
        seen = []
        for _ in range(number):
            batches = [batch for loader in loaders for batch in loader.next_step()]
            seen.append(sorted(row.tolist() for batch in batches for row in batch.tokens_bs))
        for loader in loaders:
            loader.close()
        return seen

    expected = steps(None, (8, 1), 0, 100)
    assert steps(IndexCache(), (1, 2), 0, 45) == expected[:45]
    assert steps(IndexCache(), (4, 1), 45 * 8, 55) == expected[45:]


def test_samples_used_are_those_that_locate_gives():
    class Anything:
        sequence_length = 0

    blend = Blend([Anything() for _ in range(4)], [5.0, 1.0, 2.5, 0.1])
    for total in (0, 1, 17, 500):
        found = [blend.locate(k)[0] for k in range(total)]
        assert blend.samples_used(total) == tuple(found.count(c) for c in range(4))


class TestCommand:
    """`litespark data index` builds what a run reads, and no more."""

    def config(self, tmp_path, prefix):
        write_shard(tmp_path / "b", [9] * 400)
        content = {
            "run": {"output_dir": str(tmp_path / "out")},
            "model": {"preset": "tiny"},
            "data": {
                "blend": [
                    {"prefix": prefix, "weight": 1.0},
                    {"prefix": str(tmp_path / "b"), "weight": 1.0},
                ],
                "split": [80, 20, 0],
                "sequence_length": 8,
            },
            "batch": {"global": 10},
            "optimizer": {"lr": 1.0},
            # 250 samples of each: two epochs of the first, one of the second.
            "training": {"steps": 50, "eval_every": 10, "eval_steps": 1},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def test_builds_what_the_run_reads_and_finds_it_again(self, prefix, tmp_path, capsys):
        config = self.config(tmp_path, prefix)
        override = f"data.index_cache={tmp_path / 'index'}"
        assert main(["data", "index", config, override]) == 0
        names = [file.name for file in index_files(tmp_path / "index")]
        assert [sum(name.startswith(shard) for name in names) for shard in "ab"] == [3, 2]
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5
        assert all(": built," in line for line in lines)
        assert lines[-1].startswith("[5/5]")
        assert main(["data", "index", config, override, "--epochs", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(": found," in line for line in lines) == 5
        assert sum(": built," in line for line in lines) == 3
        assert not (tmp_path / "out").exists()

    def test_mistakes(self, prefix, tmp_path, capsys):
        config = self.config(tmp_path, prefix)
        assert main(["data", "index", config, "--epochs", "0"]) == 2
        (tmp_path / "file").write_text("in the way")
        assert main(["data", "index", config, f"data.index_cache={tmp_path / 'file'}"]) == 2
        assert "cannot keep the sample index" in capsys.readouterr().err
