"""A checkpoint is what was written, to the byte, or its damage is named."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import xxhash

from litespark.checkpoint.integrity import (
    MARKER,
    ChecksumFile,
    DamagedCheckpoint,
    check_whole,
    first_intact,
    quick_faults,
    read_marker,
    record_of,
    share_faults,
    write_file,
    write_marker,
)
from litespark.checkpoint.optimizer_state import boxes
from litespark.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    return make(tmp_path / "step_000000007", 7)


def make(folder, step):
    (folder / "state").mkdir(parents=True)
    contents = {
        "state/__0_0.distcp": bytes(range(256)) * 9 + bytes([step]),
        "state/__1_0.distcp": b"b" * 1000,
        "run_state.json": b"{}",
    }
    files = {name: write_file(folder / name, content) for name, content in contents.items()}
    write_marker(folder, step, files)
    return folder


def test_whole(checkpoint):
    check_whole(checkpoint)
    assert quick_faults(checkpoint) == []
    shares = [share_faults(checkpoint, share, 5) for share in range(5)]
    assert shares == [[]] * 5


def test_checksums_are_xxh3_of_the_bytes(checkpoint):
    for name, record in read_marker(checkpoint).items():
        content = (checkpoint / name).read_bytes()
        assert record.checksum == xxhash.xxh3_128_hexdigest(content)
        assert record.size_bytes == len(content)
        assert record_of(checkpoint / name) == record


def test_a_file_written_in_parts_has_the_checksum_of_the_whole(tmp_path):
    with ChecksumFile(tmp_path / "x") as file:
        assert file.write(b"ab") == 2
        assert file.write(memoryview(b"cdef").cast("H")) == 4, "bytes, not elements"
        assert file.tell() == 6
        record = file.force()
    assert record == record_of(tmp_path / "x")


@pytest.mark.parametrize("name", ["state/__0_0.distcp", "state/__1_0.distcp", "run_state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "append", "empty"])
def test_damage_is_named_by_exactly_one_share(name, damage, checkpoint):
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    content = {"truncate": content[:-1], "append": content + b"x", "empty": b""}.get(
        damage, content
    )
    path.write_bytes(content)
    if damage == "delete":
        path.unlink()
    found = [share_faults(checkpoint, share, 2) for share in range(2)]
    assert sorted(map(len, found)) == [0, 1]
    assert str(path) in (found[0] or found[1])[0]
    assert bool(quick_faults(checkpoint)) == (damage != "flip"), "a flip needs the bytes read"
    with pytest.raises(DamagedCheckpoint, match="is damaged"):
        check_whole(checkpoint)


def test_swapped_files_of_one_size(checkpoint):
    other = make(checkpoint.parent / "step_000000008", 8)
    shutil.copy(other / "state/__0_0.distcp", checkpoint / "state/__0_0.distcp")
    assert quick_faults(checkpoint) == []
    assert "__0_0.distcp has other content" in share_faults(checkpoint)[0]


def test_a_whole_checkpoint_under_the_name_of_another_step(checkpoint):
    checkpoint.rename(checkpoint.parent / "step_000000009")
    with pytest.raises(DamagedCheckpoint, match="it is that of step 7"):
        read_marker(checkpoint.parent / "step_000000009")


def test_a_whole_checkpoint_under_a_name_of_ones_own(checkpoint):
    check_whole(checkpoint.rename(checkpoint.parent / "best"))


@pytest.mark.parametrize("position", range(0, 600, 7))
def test_a_flipped_bit_in_the_marker(position, checkpoint):
    path = checkpoint / MARKER
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)
    assert quick_faults(checkpoint), "accepted"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "state/../../secret", "", "."])
def test_a_marker_cannot_name_files_outside(name, checkpoint, tmp_path):
    (tmp_path / "secret").write_bytes(b"s")
    record = record_of(tmp_path / "secret")
    write_marker(checkpoint, 7, {**read_marker(checkpoint), name: record})
    with pytest.raises(DamagedCheckpoint, match="names a file outside"):
        read_marker(checkpoint)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{}", b"\xff\xfe", b'{"checksum": 1}', b"[" * 100_000],
    ids=["empty", "list", "null", "object", "no text", "wrong", "deep"],
)
def test_a_marker_of_garbage(content, checkpoint):
    (checkpoint / MARKER).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="is not what was written"):
        read_marker(checkpoint)


def test_a_marker_of_another_version_with_a_right_checksum(checkpoint):
    path = checkpoint / MARKER
    content = json.loads(path.read_text())
    del content["checksum"]
    content["algorithm"] = "none"
    text = json.dumps(content, sort_keys=True)
    path.write_text(json.dumps(content | {"checksum": xxhash.xxh3_128_hexdigest(text.encode())}))
    with pytest.raises(DamagedCheckpoint, match="another version"):
        read_marker(checkpoint)


def test_the_first_intact_is_taken(tmp_path):
    three = [make(tmp_path / f"step_{step:09d}", step) for step in (3, 2, 1)]
    assert first_intact(three) == three[0]
    (three[0] / MARKER).unlink()
    os.truncate(three[1] / "state/__1_0.distcp", 10)
    assert first_intact(three) == three[2]
    (three[2] / "run_state.json").unlink()
    with pytest.raises(UserError, match="holds 3 checkpoints and each is damaged"):
        first_intact(three)
    with pytest.raises(DamagedCheckpoint, match=r"run_state\.json is missing"):
        first_intact(three[2:])
    assert first_intact([]) is None


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2)])
def test_boxes_cover_a_run_of_elements_once_and_in_order(shape):
    size = math.prod(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            found = list(boxes(shape, start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            numbers = [n for offsets, sizes in found for n in elements(shape, offsets, sizes)]
            assert numbers == list(range(start, stop))


def elements(shape, offsets, sizes):
    """Row-major numbers of a box's elements."""
    if not shape:
        return [0]
    row = math.prod(shape[1:])
    return [
        first * row + rest
        for first in range(offsets[0], offsets[0] + sizes[0])
        for rest in elements(shape[1:], offsets[1:], sizes[1:])
    ]
