"""The moment when the files of a shard get their names."""

from __future__ import annotations

from contextlib import suppress

from litespark.data.index_file import bin_path, idx_path
from litespark.data.manifest import Manifest, manifest_path, write_manifest
from litespark.utils.files import HashingFile, rename_durably


def publish_shard(
    prefix: str, manifest: Manifest | None, bin_file: HashingFile, idx_file: HashingFile
) -> None:
    """Name the manifest, then `.bin`, then `.idx`: whoever sees the index sees all of it.

    The two files have been forced to the disk under temporary names; nothing stays if this fails.

    Raises:
        OSError: when the disk refuses.
    """
    try:
        if manifest is not None:
            write_manifest(prefix, manifest)
        rename_durably(bin_file.path, bin_path(prefix))
        rename_durably(idx_file.path, idx_path(prefix))
    except BaseException:
        for path in (idx_path(prefix), bin_path(prefix), manifest_path(prefix)):
            with suppress(FileNotFoundError):
                path.unlink()
        raise
