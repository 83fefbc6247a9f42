"""Files changed at random: refused with a message, or they give what was written; never a crash.

A run of the test suite takes a few hundred cases.  For more, as after a change of a format:

    LITESPARK_FUZZ_CASES=12000 python -m pytest tests/unit/test_data_fuzz.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litespark.cli.main import main
from litespark.data.corpus import Corpus
from litespark.data.index_file import HEADER_BYTES
from litespark.data.indexed import IndexedReader, IndexedWriter
from litespark.data.manifest import (
    Manifest,
    SourceRecord,
    TokenizerRecord,
    read_manifest,
    write_manifest,
)
from litespark.data.sample_index import IndexCache
from litespark.data.verify import verify_shard
from litespark.errors import UserError

TESTS = 6
CASES_EACH = max(1, int(os.environ.get("LITESPARK_FUZZ_CASES", "400")) // TESTS)
fuzzed = settings(
    max_examples=CASES_EACH,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

VOCAB_SIZE = 500
INTERESTING = [0, 1, 2, 3, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]


@st.composite
def damages(draw):
    """A change of a file's bytes, as a function of them; it may leave them as they are."""
    kind = draw(st.sampled_from(["flip", "byte", "word", "cut", "insert", "delete", "swap", "all"]))
    place = draw(st.floats(0, 1, exclude_max=True))
    amount = draw(st.integers(0, 40))
    junk = draw(st.binary(min_size=1, max_size=40))
    word = draw(st.sampled_from(INTERESTING)).to_bytes(8, "little")[: draw(st.sampled_from([4, 8]))]
    other = draw(st.floats(0, 1, exclude_max=True))

    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        data = bytearray(content)
        if kind == "flip":
            data[at] ^= 1 << (amount % 8)
        elif kind == "byte":
            data[at] = junk[0]
        elif kind == "word":
            data[at : at + len(word)] = word
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = junk
        elif kind == "delete":
            del data[at : at + amount]
        elif kind == "swap":  # two pieces of a table change places
            to = int(other * len(content))
            piece, target = data[at : at + 8], data[to : to + 8]
            if len(piece) == len(target) == 8 and abs(at - to) >= 8:
                data[at : at + 8], data[to : to + 8] = target, piece
        else:
            data[at:] = junk
        return bytes(data)

    return damage


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(sum)


def write(prefix: Path, lengths: list[int]) -> np.ndarray:
    """Write a shard with a manifest over whatever is there; return its tokens."""
    tokens = np.arange(sum(lengths)) % VOCAB_SIZE
    writer = IndexedWriter(prefix, VOCAB_SIZE)
    writer.add_documents(tokens, lengths)
    files = writer.seal()
    writer.publish()
    tokenizer = TokenizerRecord("0" * 64, "tokenizer.model", VOCAB_SIZE, 2)
    half = len(lengths) // 2
    sources = (SourceRecord("a", 10, half), SourceRecord("b", 10, len(lengths) - half))
    write_manifest(prefix, Manifest(tokenizer, False, "text", sources, files, 0, 0, "0"))
    return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def command(*arguments) -> int:
    """Run `litespark data ...`; whatever it raises beside an expected error fails the test."""
    return main(["data", *map(str, arguments)])


@fuzzed
@given(lengths=LENGTHS, damage=damages())
def test_index_is_refused_or_every_token_is_still_there_once(folder, lengths, damage):
    """As a shard of Megatron-LM, which has no manifest to tell more."""
    prefix = folder / "a"
    tokens = write(prefix, lengths)
    (folder / "a.json").unlink()
    path = folder / "a.idx"
    whole = path.read_bytes()
    changed = damage(whole)
    path.write_bytes(changed)
    try:
        reader = IndexedReader(prefix)
    except UserError:
        assert changed != whole
        return
    documents = [reader.read(document) for document in range(reader.documents)]
    # Compared as bytes: another type code of the same size is no loss, and `verify` judges ids.
    assert b"".join(d.tobytes() for d in documents) == (folder / "a.bin").read_bytes()
    assert [len(d) for d in documents] == reader.document_lengths_tokens.tolist()
    if changed[HEADER_BYTES:] == whole[HEADER_BYTES:]:
        assert [len(d) for d in documents] == lengths
    if len(tokens) > 5:
        sample = Corpus(reader, (0, reader.documents), 3, 1)[0]
        assert sample.shape == (4,)


@fuzzed
@given(lengths=LENGTHS, damage=damages(), suffix=st.sampled_from([".bin", ".idx"]))
def test_with_a_manifest_any_changed_byte_is_refused(folder, lengths, damage, suffix):
    prefix = folder / "b"
    write(prefix, lengths)
    path = folder / f"b{suffix}"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    if path.read_bytes() == whole:
        assert verify_shard(str(prefix)).documents == len(lengths)
    else:
        with pytest.raises(UserError, match="b"):
            verify_shard(str(prefix))


@fuzzed
@given(lengths=LENGTHS, damage=damages(), suffix=st.sampled_from([".bin", ".idx", ".json"]))
def test_commands_end_with_0_or_2(folder, capsys_disabled, lengths, damage, suffix):
    prefix = folder / "c"
    write(prefix, lengths)
    path = folder / f"c{suffix}"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    same = path.read_bytes() == whole
    codes = {command("verify", prefix), command("stats", prefix, "--json")}
    codes.add(command("stats", prefix))
    for left in folder.glob("merged*"):
        left.unlink()
    merged = command("merge", "--input", prefix, "--output-prefix", folder / "merged")
    assert (codes | {merged}) <= {0, 2}
    if same:
        assert codes == {0}
    if merged == 0 and suffix != ".json":
        assert same
        assert (folder / "merged.bin").read_bytes() == (folder / "c.bin").read_bytes()
    assert not list(folder.glob(".*.tmp"))


@pytest.fixture(scope="module")
def capsys_disabled():
    """Let the commands' thousands of lines go nowhere."""
    with open(os.devnull, "w") as sink, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", sink)
        patch.setattr("sys.stderr", sink)
        yield


@fuzzed
@given(lengths=LENGTHS, damage=damages(), sequence_length=st.integers(1, 9))
def test_sample_index_gives_the_same_samples_whatever_its_file_holds(
    folder, lengths, damage, sequence_length
):
    if sum(lengths) < sequence_length + 1:
        lengths = [*lengths, sequence_length + 1]
    prefix, cache_folder = folder / "d", folder / "index"
    write(prefix, lengths)
    shutil.rmtree(cache_folder, ignore_errors=True)

    def samples(cache):
        corpus = Corpus(prefix, (0, len(lengths)), sequence_length, 1, cache)
        return [corpus[k].tolist() for k in range(corpus.samples_per_epoch)]

    expected = samples(None)
    assert samples(IndexCache(str(cache_folder))) == expected
    (file,) = cache_folder.glob("*.npy")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert samples(IndexCache(str(cache_folder))) == expected
    assert file.read_bytes() == whole


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 2**63, 10**30, 1.5, "\ud800", "\x1b[2J", "0" * 64])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@fuzzed
@given(data=st.data())
def test_manifest_with_other_values_is_refused_or_harmless(folder, capsys_disabled, data):
    prefix = folder / "e"
    write(prefix, [3, 0, 5])
    path = folder / "e.json"
    value = json.loads(path.read_text())
    target = value
    while True:
        key = data.draw(st.sampled_from(sorted(target)))
        if isinstance(target[key], dict) and data.draw(st.booleans()):
            target = target[key]
        elif isinstance(target[key], list) and target[key] and data.draw(st.booleans()):
            target = data.draw(st.sampled_from(target[key]))
        else:
            break
    before = target[key]
    target[key] = data.draw(JSON)
    path.write_text(json.dumps(value))
    codes = [
        command("verify", prefix),
        command("stats", prefix),
        command("stats", prefix, "--json"),
    ]
    assert set(codes) <= {0, 2}
    is_same = target[key] == before and type(target[key]) is type(before)
    if key in {"bin_sha256", "idx_sha256", "bin_bytes", "idx_bytes", "tokens"} and not is_same:
        assert codes[0] == 2
    if is_same:
        assert codes == [0, 0, 0]


@fuzzed
@given(
    text=st.binary(max_size=200)
    | st.integers(1, 200_000).map(lambda n: b"[" * n)
    | JSON.map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_as_a_manifest_are_refused(folder, text):
    prefix = folder / "f"
    (folder / "f.json").write_bytes(text)
    with pytest.raises(UserError, match=r"f\.json: is not a manifest"):
        read_manifest(prefix)
