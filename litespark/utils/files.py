"""Files that are either complete or absent.

A process can be killed, and a disk can fill, between any two writes.  Whatever must be whole when
it is there is therefore written under a temporary name in the same folder, forced to the disk,
and renamed: a rename within one file system is atomic, so a reader sees the old file, the new
one, or none.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_HASH_BLOCK_BYTES = 1 << 20


def temporary_name(path: str | os.PathLike[str]) -> Path:
    """Return a fresh name in the folder of `path`, so that renaming it to `path` is atomic."""
    final = Path(path)
    return final.with_name(f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Force a file, or a folder's list of names (a rename can be lost without), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(temporary: Path, final: Path) -> None:
    """Rename `temporary`, already forced to the disk, to `final` and force the rename too."""
    os.replace(temporary, final)
    fsync_path(final.parent)


class HashingFile:
    """A new file whose SHA-256 grows with what is written; for a temporary name.

    Raises:
        OSError: when the file exists already or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by close_durably()
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            OSError: when the disk is full.
        """
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)

    def close_durably(self) -> str:
        """Force the file to the disk, close it, and return its SHA-256 in hexadecimal digits.

        Raises:
            OSError: when the disk is full.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Remove the file; nothing to do after it was renamed."""
        with suppress(OSError):  # a full disk may refuse the flush; the file goes anyway
            self._file.close()
        with suppress(FileNotFoundError):
            self.path.unlink()


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes so that it appears whole when the block ends, or not at all.

    When the block raises, the temporary file is removed and an older `path` stays as it was.

    Raises:
        OSError: when the folder is missing or the disk is full.
    """
    final = Path(path)
    temporary = temporary_name(final)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename_durably(temporary, final)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all.

    Raises:
        OSError: when the folder is missing or the disk is full.
    """
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits, in constant memory.

    Raises:
        OSError: when the file cannot be read.
    """
    return digest_of_file(path).hexdigest()


def digest_of_file(path: str | os.PathLike[str]) -> hashlib._Hash:
    """Return the SHA-256 of a file's bytes as an object that can be fed what follows them.

    Raises:
        OSError: when the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest
