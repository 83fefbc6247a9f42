"""Shards between object storage and this machine's disk.

Training reads tokens at random places through a memory map, which a store cannot give, so a shard
is fetched once, checked against its manifest on the way, and read from the disk.  The other way,
`.idx` is sent last: who sees it in the store sees the whole shard.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from litespark.data import storage
from litespark.data.index_file import bin_path, idx_path
from litespark.data.manifest import Manifest, manifest_path, read_manifest
from litespark.data.output import disk_error, prepare_folder, refuse_existing
from litespark.data.publish import publish_shard
from litespark.data.verify import open_shard
from litespark.errors import LitesparkError, UserError
from litespark.utils.files import HashingFile, temporary_name

_SUFFIXES = (".bin", ".json", ".idx")  # in this order to a store


def download_shard(
    remote: str,
    local: str,
    begin: Callable[[int], None] = lambda total_bytes: None,
    report: Callable[[int], None] = lambda read_bytes: None,
) -> None:
    """Fetch the shard `remote` (s3://...) as the local prefix `local`, whole or not at all.

    Raises:
        UserError: when it is missing, cannot be read, is damaged, or `local` exists.
        LitesparkError: when the disk is full.
    """
    prepare_folder(local, local)
    refuse_existing(local, local)
    with _told(remote):
        begin(sum(storage.size_bytes(f"{remote}{suffix}") for suffix in (".bin", ".idx")))
        manifest = _remote_manifest(remote)
    files: list[HashingFile] = []
    try:
        for path, suffix in ((bin_path(local), ".bin"), (idx_path(local), ".idx")):
            files.append(HashingFile(temporary_name(path)))
            for block in _fetched(f"{remote}{suffix}"):
                files[-1].write(block)
                report(len(block))
        digests = [file.close_durably() for file in files]
        if manifest is not None:
            expected = (manifest.files.bin_sha256, manifest.files.idx_sha256)
            for suffix, digest, wanted in zip((".bin", ".idx"), digests, expected, strict=True):
                if digest != wanted:
                    raise UserError(
                        f"{remote}{suffix}",
                        "its bytes are not those that the manifest beside it describes",
                        "Write or send the shard again.",
                    )
        publish_shard(local, manifest, files[0], files[1])
    except OSError as error:
        raise disk_error(local, error) from error
    finally:
        for file in files:
            file.discard()


def upload_shard(
    local: str,
    remote: str,
    overwrite: bool = False,
    begin: Callable[[int], None] = lambda total_bytes: None,
    report: Callable[[int], None] = lambda sent_bytes: None,
) -> None:
    """Send the local shard to the prefix `remote` (s3://...), its `.idx` last.

    Raises:
        UserError: when the shard is damaged, or `remote` exists and is not to be replaced.
        LitesparkError: when the store refuses; what had been sent is removed.
    """
    open_shard(local)  # what is damaged is not sent
    require_free(remote, overwrite)
    paths = {".bin": bin_path(local), ".json": manifest_path(local), ".idx": idx_path(local)}
    begin(sum(path.stat().st_size for path in paths.values() if path.exists()))
    try:
        storage.remove(f"{remote}.idx")  # no old index beside new tokens
        for suffix in _SUFFIXES:
            if not paths[suffix].exists():  # a shard of Megatron-LM has no manifest
                storage.remove(f"{remote}{suffix}")
                continue
            for sent_bytes in storage.upload(paths[suffix], f"{remote}{suffix}"):
                report(sent_bytes)
    except BaseException as error:
        for suffix in reversed(_SUFFIXES):
            with suppress(OSError):
                storage.remove(f"{remote}{suffix}")
        if isinstance(error, OSError):
            raise LitesparkError(
                f"{error.filename or remote}: cannot be written: {error.strerror or error}. "
                f"The shard is whole at {local}; nothing of it stays in the store."
            ) from error
        raise


def require_free(remote: str, overwrite: bool) -> None:
    """Refuse to write over a shard in a store.

    Raises:
        UserError: when one of its files is there, or the store cannot be asked.
    """
    with _told(remote):
        there = [s for s in _SUFFIXES if storage.exists(f"{remote}{s}")]
    if there and not overwrite:
        raise UserError(f"{remote}{there[0]}", "exists already", "Choose another prefix.")


@contextmanager
def local_output(output_prefix: str, overwrite: bool = False) -> Iterator[str]:
    """Give a local prefix to write shards under, and send them to `output_prefix` at the end.

    A local `output_prefix` is given as it is.  For a remote one the shards are written below
    $TMPDIR, which must have room for them, and removed when they have been sent; if sending fails
    they stay there, and the error names them.

    Raises:
        UserError: when a shard of that name is in the store and is not to be replaced.
        LitesparkError: when the store refuses.
    """
    if not storage.is_remote(output_prefix):
        yield output_prefix
        return
    parent, name = posixpath.split(output_prefix)
    if not name or not parent.removeprefix("s3:").strip("/"):
        raise UserError(
            f"--output-prefix {output_prefix}",
            "is not a bucket and the beginning of a name",
            "Give s3://BUCKET/FOLDER/NAME.",
        )
    with _told(output_prefix):
        there = [file.path for file in storage.list_files(f"{output_prefix}_*.idx")]
    if there and not overwrite:
        raise UserError(
            f"--output-prefix {output_prefix}",
            f"{there[0]} exists already",
            "Choose another prefix, or pass --overwrite.",
        )
    folder = Path(tempfile.mkdtemp(prefix="litespark-"))
    is_written = False
    try:
        yield str(folder / name)
        is_written = True
        for index in sorted(folder.glob("*.idx")):
            shard = index.name.removesuffix(".idx")
            upload_shard(str(folder / shard), f"{parent}/{shard}", overwrite)
        for listed in sorted(folder.glob("*.txt")):  # what was skipped
            with _told(f"{parent}/{listed.name}"):
                for _ in storage.upload(listed, f"{parent}/{listed.name}"):
                    pass
    except LitesparkError:
        if not is_written:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)


def _fetched(path: str) -> Iterator[bytes]:
    blocks = storage.read_blocks(path)
    while True:
        with _told(path):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def _remote_manifest(remote: str) -> Manifest | None:
    """Read the manifest by the same checks as a local one."""
    if not storage.exists(f"{remote}.json"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "shard")
        with open(manifest_path(prefix), "wb") as file:
            file.writelines(storage.read_blocks(f"{remote}.json"))
        try:
            return read_manifest(prefix)
        except UserError as error:
            raise UserError(f"{remote}.json", error.problem, "Send the shard again.") from error


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Turn a store's refusal to be read into a message for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(
            str(error.filename or path),
            f"cannot be read ({error.strerror or error})",
            "Check the name, your credentials (AWS_ACCESS_KEY_ID, ~/.aws) and, for a compatible "
            "store, AWS_ENDPOINT_URL.",
        ) from error
