"""Files in object storage beside local ones: `s3://bucket/key` through s3fs, the rest as always.

Amazon's and compatible stores (MinIO, Ceph, R2) are reached through the extra `s3`.  Who you are
and where the store is comes from where every AWS tool looks: environment variables
(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL for a compatible store), ~/.aws, or the
machine's role.

A store has no rename and no half-written object: an upload is there whole when it ends, or not at
all.  Whatever goes wrong on the way is an OSError, as for a local file, so that the code above
need not know where a file lives.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, BinaryIO

from litespark.errors import MissingExtraError, UserError

_SCHEME = "s3://"
_READ_AHEAD_BYTES = 8 << 20
_COPY_BYTES = 8 << 20
_UPLOAD_PART_BYTES = 64 << 20  # a store takes 10,000 parts, so files of 640 GB


@dataclass(frozen=True)
class FileVersion:
    """A file's size, and its time of change in ns (local) or its ETag (in a store)."""

    size_bytes: int
    change: int | str


@dataclass(frozen=True)
class RemoteFile:
    """An object: its path with the scheme, and its version."""

    path: str
    version: FileVersion


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names an object in a store.

    Raises:
        UserError: when it has a scheme other than s3.
    """
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if not separator or not scheme.isalnum():
        return False
    if text.startswith(_SCHEME):
        return True
    raise UserError(text, f"the scheme {scheme}:// is not known", "Give a local path or s3://...")


def open_for_reading(path: str) -> BinaryIO:
    """Open a file, local or in a store, to be read from its beginning to its end.

    Raises:
        OSError: when it is missing or cannot be read; also from the file's `read`.
        MissingExtraError: when the path is remote and s3fs is not installed.
    """
    if not is_remote(path):
        return open(path, "rb")
    store = _store()
    with _as_os_error(path):
        file = store.open(path, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead")
    return io.BufferedReader(_RemoteReader(file, path), _READ_AHEAD_BYTES)


def size_bytes(path: str) -> int:
    """Return the size of a file, local or in a store.

    Raises:
        OSError: when it is missing or cannot be asked for.
    """
    if not is_remote(path):
        return os.path.getsize(path)
    with _as_os_error(path):
        return int(_store().info(path)["size"])


def version_of(path: str) -> FileVersion:
    """Return what tells a file from a later one of the same name.

    Raises:
        OSError: when it is missing or cannot be asked for.
    """
    if not is_remote(path):
        found = os.stat(path)
        return FileVersion(found.st_size, found.st_mtime_ns)
    with _as_os_error(path):
        return _version(_store().info(path))


def _version(entry: dict[str, Any]) -> FileVersion:
    return FileVersion(int(entry["size"]), str(entry.get("ETag", "")))


def exists(path: str) -> bool:
    """Return whether there is a file, local or in a store.

    Raises:
        OSError: when the store cannot be asked.
    """
    if not is_remote(path):
        return os.path.lexists(path)
    with _as_os_error(path):
        return bool(_store().exists(path))


def list_files(path: str) -> list[RemoteFile]:
    """Return the objects that a remote path stands for, sorted by name.

    It may be one object, a folder (all objects below it), or a glob with *, ? and **.

    Raises:
        OSError: when the store cannot be asked.
    """
    store = _store()
    with _as_os_error(path):
        if any(character in path for character in "*?["):
            found = store.glob(path, detail=True)
        else:
            found = store.find(path.rstrip("/"), detail=True)
    files = [
        RemoteFile(_SCHEME + name, _version(entry))
        for name, entry in found.items()
        if entry["type"] == "file" and not name.endswith("/")  # consoles make "folder/" objects
    ]
    return sorted(files, key=lambda file: file.path)


def read_blocks(path: str) -> Iterator[bytes]:
    """Yield a file's bytes, local or in a store, some at a time.

    Raises:
        OSError: when it is missing or cannot be read.
    """
    with open_for_reading(path) as file:
        while block := file.read(_COPY_BYTES):
            yield block


def upload(local: str | os.PathLike[str], remote: str) -> Generator[int, None, None]:
    """Copy a local file to a store, yielding the bytes of each part sent; whole or not at all.

    Raises:
        OSError: when the file cannot be read or the store refuses it.
    """
    with _as_os_error(remote), open(local, "rb") as source:
        target = _store().open(remote, "wb", block_size=_UPLOAD_PART_BYTES)
        try:
            while block := source.read(_COPY_BYTES):
                target.write(block)
                yield len(block)
        except BaseException:
            target.discard()  # the parts sent so far; nothing has the object's name
            target.closed = True
            raise
        target.close()


def write_bytes(remote: str, content: bytes) -> None:
    """Write a small object, whole or not at all.

    Raises:
        OSError: when the store refuses.
    """
    with _as_os_error(remote):
        _store().pipe_file(remote, content)


def remove_all(remotes: Sequence[str]) -> None:
    """Remove objects that are there.

    Raises:
        OSError: when the store refuses.
    """
    if remotes:
        with _as_os_error(remotes[0]):
            _store().rm(list(remotes))


def remove(remote: str) -> None:
    """Remove an object if it is there.

    Raises:
        OSError: when the store refuses.
    """
    with _as_os_error(remote):
        if _store().exists(remote):
            _store().rm_file(remote)


def require_storage() -> None:
    """Refuse to go on without the library that speaks to stores.

    Raises:
        MissingExtraError: when s3fs is not installed.
    """
    if find_spec("s3fs") is None:
        raise MissingExtraError("s3fs", "s3", "s3://")


@cache
def _store() -> Any:
    require_storage()
    import s3fs

    # A listing from before would hide what another job has written since.
    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)


@contextmanager
def _as_os_error(path: str) -> Iterator[None]:
    """Turn what the client library raises into an OSError that names the object."""
    import botocore.exceptions

    try:
        yield
    except OSError as error:
        if error.filename == path:
            raise
        reason = error.strerror or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such object or bucket"
        raise type(error)(error.errno or 0, reason, path) from error
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise OSError(0, str(error).rstrip("."), path) from error


class _RemoteReader(io.RawIOBase):
    """The object as a raw file, whose failures are OSErrors."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the object goes on."""
        with _as_os_error(self._path):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the object too."""
        self._file.close()
        super().close()
