"""Object storage, against a real HTTP server that speaks S3 (moto's), from real clients."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from litespark.cli.main import main
from litespark.data import storage, transfer
from litespark.data.indexed import IndexedReader
from litespark.data.manifest import manifest_path, read_manifest
from litespark.data.preprocess import PreprocessOptions, preprocess
from litespark.errors import LitesparkError, MissingExtraError, UserError
from tests.support.data import PARAGRAPHS, train_json_tokenizer, write_jsonl, write_shard
from tests.support.store import empty_bucket, running_store

pytest.importorskip("s3fs", reason="the extra 's3' is not installed")
pytest.importorskip("moto.server", reason="moto is not installed")

BUCKET = "s3://shelf"


@pytest.fixture(scope="module")
def server():
    """A store on this machine, where the environment says that it is."""
    with running_store() as address:
        yield address


@pytest.fixture
def store(server):
    """The store with an empty bucket `shelf`."""
    return empty_bucket(server, BUCKET)


def put(store, name, content):
    with store.open(f"{BUCKET}/{name}", "wb") as file:
        file.write(content)


def names(store):
    return sorted(name.removeprefix("shelf/") for name in store.find(BUCKET))


def parts_waiting(store):
    """Uploads begun and neither ended nor given up; a store keeps, and charges for, their parts."""
    return store.call_s3("list_multipart_uploads", Bucket="shelf").get("Uploads", [])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    data = write_jsonl(folder / "a.jsonl", PARAGRAPHS[:50])
    tokenizer = train_json_tokenizer(folder / "tokenizer")
    preprocess(PreprocessOptions((str(data),), str(tokenizer), str(folder / "p")))
    return folder / "p_text_document"


def command(*arguments):
    return main(["data", *map(str, arguments)])


def test_local_paths_need_no_store(tmp_path):
    assert not storage.is_remote("data/a.jsonl")
    assert not storage.is_remote("C:\\data")
    assert storage.is_remote("s3://bucket/a")
    with pytest.raises(UserError, match="the scheme gs:// is not known"):
        storage.is_remote("gs://bucket/a")
    (tmp_path / "a").write_bytes(b"local")
    with storage.open_for_reading(str(tmp_path / "a")) as file:
        assert file.read() == b"local"
    assert storage.size_bytes(str(tmp_path / "a")) == 5


def test_object_is_read_whole_in_pieces_of_any_size(store):
    content = np.random.default_rng(0).bytes(20_000_003)  # more than two read-aheads
    put(store, "deep/er/a.bin", content)
    path = f"{BUCKET}/deep/er/a.bin"
    assert storage.size_bytes(path) == len(content)
    assert b"".join(storage.read_blocks(path)) == content
    with storage.open_for_reading(path) as file:
        pieces = iter(lambda: file.read(8191), b"")
        assert b"".join(pieces) == content
    put(store, "empty", b"")
    assert b"".join(storage.read_blocks(f"{BUCKET}/empty")) == b""


def test_listing_takes_an_object_a_folder_or_a_glob(store):
    for name in ("train/chunk2/b.jsonl", "train/chunk1/a.jsonl", "train/c.txt", "trainer/x"):
        put(store, name, name.encode())
    put(store, "train/", b"")  # as a console's "create folder" leaves it

    def listed(path):
        files = storage.list_files(path)
        # The listing's versions are those that asking for each file would give.
        assert [file.version for file in files] == [storage.version_of(f.path) for f in files]
        return [(f.path.removeprefix(f"{BUCKET}/"), f.version.size_bytes) for f in files]

    every = [("train/c.txt", 11), ("train/chunk1/a.jsonl", 20), ("train/chunk2/b.jsonl", 20)]
    assert listed(f"{BUCKET}/train") == listed(f"{BUCKET}/train/") == every
    assert listed(f"{BUCKET}/train/**/*.jsonl") == every[1:]
    assert listed(f"{BUCKET}/train/c.txt") == every[:1]
    assert listed(f"{BUCKET}/nothing") == []
    # What another job writes is seen at once.
    put(store, "train/d.txt", b"")
    assert len(listed(f"{BUCKET}/train")) == 4


def test_missing_object_is_an_os_error_that_names_it(store):
    for path in (f"{BUCKET}/none", "s3://no-such-bucket/a"):
        with pytest.raises(OSError, match="no such object or bucket") as caught:
            b"".join(storage.read_blocks(path))
        assert caught.value.filename == path
        assert not storage.exists(path)


def test_store_that_does_not_answer_is_an_os_error(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    storage._store.cache_clear()
    try:
        with pytest.raises(OSError, match=r"Could not connect|endpoint") as caught:
            storage.size_bytes(f"{BUCKET}/a")
        assert caught.value.filename == f"{BUCKET}/a"
    finally:
        storage._store.cache_clear()


def test_shard_goes_to_the_store_and_comes_back(store, written, tmp_path, capsys):
    assert command("copy", written, f"{BUCKET}/shards/") == 0
    assert names(store) == [f"shards/p_text_document{s}" for s in (".bin", ".idx", ".json")]
    remote = f"{BUCKET}/shards/p_text_document"
    assert command("copy", remote, tmp_path / "new") == 0
    local = tmp_path / "new" / "p_text_document"
    assert capsys.readouterr().out == (f"{written} -> {remote}\n{remote} -> {local}\n")
    for suffix in (".bin", ".idx"):
        assert local.with_suffix(suffix).read_bytes() == written.with_suffix(suffix).read_bytes()
    assert read_manifest(local) == read_manifest(written)
    assert command("verify", local) == 0
    assert sorted(os.listdir(local.parent)) == sorted(
        f"p_text_document{s}" for s in (".bin", ".idx", ".json")
    )
    # Neither side is written over.
    assert command("copy", written, f"{BUCKET}/shards/") == 2
    assert command("copy", remote, tmp_path / "new") == 2
    assert capsys.readouterr().err.count("exists already") == 2


def test_shard_without_a_manifest_is_copied_too(store, tmp_path):
    write_shard(tmp_path / "bare", [5, 6])
    assert command("copy", tmp_path / "bare", BUCKET) == 0
    assert command("copy", f"{BUCKET}/bare", tmp_path / "back") == 0
    assert IndexedReader(tmp_path / "back" / "bare").document_lengths_tokens.tolist() == [5, 6]
    assert not manifest_path(tmp_path / "back" / "bare").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_damaged_shard_in_the_store_is_not_fetched(store, written, tmp_path, capsys, suffix):
    assert command("copy", written, BUCKET) == 0
    content = bytearray(written.with_suffix(suffix).read_bytes())
    content[len(content) // 2] ^= 4
    put(store, f"p_text_document{suffix}", bytes(content))
    assert command("copy", f"{BUCKET}/p_text_document", tmp_path / "new") == 2
    errors = capsys.readouterr().err
    assert f"{BUCKET}/p_text_document{suffix}: its bytes are not those" in errors
    assert os.listdir(tmp_path / "new") == []


def test_index_is_sent_last_and_a_failed_upload_leaves_nothing(store, written, monkeypatch):
    sent = []
    upload = storage.upload

    def fail_at_the_index(local, remote):
        sent.append(os.path.splitext(remote)[1])
        if remote.endswith(".idx"):
            raise OSError(0, "the store is full", remote)
        return upload(local, remote)

    monkeypatch.setattr(storage, "upload", fail_at_the_index)
    with pytest.raises(LitesparkError, match="the store is full"):
        transfer.upload_shard(str(written), f"{BUCKET}/p")
    assert sent == [".bin", ".json", ".idx"]
    assert names(store) == []


def test_interrupted_upload_leaves_no_object(store, tmp_path):
    (tmp_path / "big").write_bytes(bytes(100 << 20))  # more than one part
    parts = storage.upload(tmp_path / "big", f"{BUCKET}/big")
    for _ in range(9):
        next(parts)
    assert len(parts_waiting(store)) == 1
    parts.close()  # as an exception in the loop around it does
    assert names(store) == []
    assert parts_waiting(store) == []
    total = sum(storage.upload(tmp_path / "big", f"{BUCKET}/big"))
    assert total == storage.size_bytes(f"{BUCKET}/big") == 100 << 20


def test_job_writes_to_the_store_through_the_disk(store, written, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with transfer.local_output(f"{BUCKET}/out/p") as prefix:
        for name in ("a", "b"):
            for suffix in (".bin", ".idx", ".json"):
                content = written.with_suffix(suffix).read_bytes()
                with open(f"{prefix}_{name}_document{suffix}", "wb") as file:
                    file.write(content)
        assert names(store) == []
    assert len(names(store)) == 6
    assert names(store)[0] == "out/p_a_document.bin"
    assert os.listdir(tmp_path) == []
    with (
        pytest.raises(UserError, match=r"p_a_document\.idx exists already"),
        transfer.local_output(f"{BUCKET}/out/p"),
    ):
        pass
    with pytest.raises(UserError, match="is not a bucket"), transfer.local_output("s3://p"):
        pass
    with transfer.local_output("data/p") as prefix:
        assert prefix == "data/p"


def test_failed_job_sends_nothing_and_failed_sending_keeps_the_shard(
    store, written, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ZeroDivisionError), transfer.local_output(f"{BUCKET}/p") as prefix:
        raise ZeroDivisionError
    assert (names(store), os.listdir(tmp_path)) == ([], [])

    def refuse(local, remote):
        raise OSError(0, "Access Denied", remote)

    monkeypatch.setattr(storage, "upload", refuse)
    with (
        pytest.raises(LitesparkError, match="The shard is whole at ") as caught,
        transfer.local_output(f"{BUCKET}/p") as prefix,
    ):
        write_shard(Path(f"{prefix}_text_document"), [3])
    assert prefix in str(caught.value)
    assert IndexedReader(f"{prefix}_text_document").tokens == 3
    assert names(store) == []


def test_mistakes(store, written, tmp_path, capsys):
    for arguments, problem in [
        ([f"{BUCKET}/none", tmp_path], "none.bin: cannot be read (no such object or bucket)"),
        ([written, tmp_path], "are both local"),
        ([f"{BUCKET}/a", f"{BUCKET}/b"], "are both in a store"),
        ([tmp_path / "none", BUCKET], "is missing"),
        (["gs://bucket/a", tmp_path], "the scheme gs:// is not known"),
    ]:
        assert command("copy", *arguments) == 2
        assert problem in capsys.readouterr().err
    with pytest.raises(UserError, match="Fetch it first: litespark data copy s3://shelf/p"):
        IndexedReader(f"{BUCKET}/p")


def test_missing_library_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    storage._store.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'litespark\[s3\]'"):
        storage.open_for_reading("s3://bucket/a")
    assert command("copy", "s3://bucket/a", tmp_path) == 2
    assert "litespark[s3]" in capsys.readouterr().err


def run_preprocess(folder, *arguments):
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        train_json_tokenizer(tokenizer)
    return main(["preprocess", "--tokenizer", str(tokenizer), *map(str, arguments)])


@pytest.fixture
def text(store, tmp_path):
    """Two files in the store, one of them compressed, and the same two on this machine."""
    import gzip

    first = write_jsonl(tmp_path / "text" / "a.jsonl", PARAGRAPHS[:30])
    second = write_jsonl(tmp_path / "b.jsonl", PARAGRAPHS[30:50])
    packed = tmp_path / "text" / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(second.read_bytes()))
    put(store, "text/a.jsonl", first.read_bytes())
    put(store, "text/b.jsonl.gz", packed.read_bytes())
    put(store, "text/readme.txt", b"passed over")
    return tmp_path / "text"


def test_preprocess_from_store_to_store_is_preprocess_on_this_machine(text, tmp_path):
    options = ["--workers", "1"]
    local = ["--input", text, "--output-prefix", tmp_path / "local"]
    assert run_preprocess(tmp_path, *options, *local) == 0
    remote = ["--input", f"{BUCKET}/text", "--output-prefix", f"{BUCKET}/shards/c"]
    assert run_preprocess(tmp_path, *options, *remote) == 0
    prefix = f"{BUCKET}/shards/c_text_document"
    back = tmp_path / "back"
    back.mkdir()
    assert command("copy", prefix, back) == 0
    for suffix in (".bin", ".idx"):
        ours = (back / f"c_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"local_text_document{suffix}").read_bytes()
    here = read_manifest(tmp_path / "local_text_document")
    there = read_manifest(back / "c_text_document")
    assert here is not None
    assert there is not None
    assert here.sources == there.sources  # names, sizes, hashes, documents


def test_what_was_skipped_goes_to_the_store_too(store, tmp_path):
    put(store, "bad.jsonl", b'{"text": "a b c"}\n{broken\n')
    remote = ["--input", f"{BUCKET}/bad.jsonl", "--output-prefix", f"{BUCKET}/out/c"]
    assert run_preprocess(tmp_path, *remote, "--workers", "1", "--on-error", "skip") == 0
    assert "out/c_quarantine.txt" in names(store)
    with store.open(f"{BUCKET}/out/c_quarantine.txt", "rb") as file:
        assert file.read().startswith(b"s3://shelf/bad.jsonl:2: ")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--input", f"{BUCKET}/nothing", "--output-prefix", "{here}/x"], "no .jsonl"),
        (["--input", "s3://nowhere/at-all", "--output-prefix", "{here}/x"], "nowhere"),
        (["--input", f"{BUCKET}/t.parquet", "--output-prefix", "{here}/x"], "out of order"),
        (
            ["--input", f"{BUCKET}/a.jsonl", "--output-prefix", f"{BUCKET}/x", "--resume"],
            "not in the store",
        ),
        (
            ["--input", f"{BUCKET}/a.jsonl", f"{BUCKET}/a.jsonl", "--output-prefix", "{here}/x"],
            "named twice",
        ),
    ],
)
def test_mistakes_with_a_store_are_told(store, tmp_path, capsys, arguments, problem):
    put(store, "a.jsonl", b'{"text": "a"}\n')
    put(store, "t.parquet", b"PAR1")
    given = [argument.format(here=tmp_path) for argument in arguments]
    assert run_preprocess(tmp_path, *given, "--workers", "1") == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
