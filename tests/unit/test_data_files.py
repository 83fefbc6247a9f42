"""Files appear whole or not at all, and commands end with the code of their error."""

from __future__ import annotations

import hashlib
import os

import pytest

from litespark.cli.exits import run_command
from litespark.errors import GuardError, LitesparkError, UserError
from litespark.utils.files import atomic_write, sha256_of_file, write_text_atomically


def test_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def fail_while_writing(path):
    with atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def test_failure_leaves_the_old_file_and_no_other(tmp_path):
    write_text_atomically(tmp_path / "a", "old ä")
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(tmp_path / "a")
    assert (tmp_path / "a").read_text("utf-8") == "old ä"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_bytes_and_name_are_forced_to_the_disk_around_the_rename(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(kind)
        real_fsync(descriptor)

    def replace(source, target):
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text_atomically(tmp_path / "a", "x")
    assert events == ["file", "rename", "folder"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text_atomically(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_sha256_of_file(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            UserError("a.b = 3", "is odd", "Use 4."),
            2,
            "litespark: error: a.b = 3: is odd. Use 4.\n",
        ),
        (LitesparkError("broken"), 1, "litespark: error: broken\n"),
        (GuardError("loss is NaN"), 4, "litespark: error: loss is NaN\n"),
        (KeyboardInterrupt(), 130, "litespark: interrupted\n"),
    ],
)
def test_exit_code_and_message_of_an_expected_error(capsys, error, code, message):
    def command():
        raise error

    assert run_command(command) == code
    assert capsys.readouterr().err == message


def test_result_is_the_exit_code_and_a_bug_keeps_its_traceback():
    assert run_command(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
