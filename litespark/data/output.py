"""Where a shard is to be written: whether it can be, told before hours of work and not after."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from litespark.data.indexed import bin_path, idx_path
from litespark.data.manifest import manifest_path
from litespark.data.storage import is_remote
from litespark.errors import LitesparkError, UserError
from litespark.utils.files import temporary_name


def check_output_name(output_prefix: str) -> None:
    """Refuse a prefix that ends in no name, or lies in a store, where nothing can be renamed.

    Args:
        output_prefix: what the user typed after --output-prefix.

    Raises:
        UserError: when it is empty, ends like a folder, or is not on this machine.
    """
    if is_remote(output_prefix):
        raise UserError(
            f"--output-prefix {output_prefix}",
            "is in a store, and shards are made on this machine",
            "Give a local prefix, and send the shards with `litespark data copy`.",
        )
    if os.path.basename(output_prefix) in ("", ".", ".."):
        raise UserError(
            f"--output-prefix {output_prefix or repr('')}",
            "does not end in a name for the output's files",
            "Give a folder and a name, like data/corpus.",
        )


def prepare_folder(output_prefix: str, shard_prefix: str) -> None:
    """Make the output's folder, and refuse names that could not be written there.

    Args:
        output_prefix: what the user typed after --output-prefix.
        shard_prefix: the prefix of the files to write.

    Raises:
        UserError: when the folder cannot be made, a name is too long, or is that of a folder.
        LitesparkError: when the disk is full.
    """
    try:
        Path(shard_prefix).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            # The longest name to come: if it is too long, say so now and not after hours.
            temporary_name(manifest_path(shard_prefix)).lstat()
        for path in _files_of(shard_prefix):
            if path.is_dir():
                raise UserError(
                    f"--output-prefix {output_prefix}",
                    f"{path} is a folder",
                    "Remove it, or choose another prefix.",
                )
    except OSError as error:
        raise unusable_output(output_prefix, shard_prefix, error) from error


def refuse_existing(output_prefix: str, shard_prefix: str, other_way: str = "") -> None:
    """Refuse to write over a shard.

    Args:
        output_prefix: what the user typed after --output-prefix.
        shard_prefix: the prefix of the files to write.
        other_way: what else the user may do, as the end of a sentence.

    Raises:
        UserError: when one of the shard's files is there.
    """
    for path in _files_of(shard_prefix):
        if os.path.lexists(path):
            raise UserError(
                f"--output-prefix {output_prefix}",
                f"{path} exists already",
                f"Choose another prefix{other_way}.",
            )


def unusable_output(output_prefix: str, shard_prefix: str, error: OSError) -> LitesparkError:
    """Return the error for an output whose folder or first file could not be made."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # no mistake of the user's
        return disk_error(shard_prefix, error)
    reason = error.strerror or str(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = "a part of the path is a file, not a folder"
    return UserError(
        f"--output-prefix {output_prefix}",
        f"the output cannot be made there: {reason}",
        "Choose a prefix in a folder that you may write to, with a name that is not too long.",
    )


def disk_error(shard_prefix: str, error: OSError, what_next: str = "") -> LitesparkError:
    """Return the error for an output that could be begun and not be finished.

    Args:
        shard_prefix: the prefix of the files to write.
        error: what the system said.
        what_next: a sentence to end the message with, a space before it.
    """
    return LitesparkError(
        f"{shard_prefix}: cannot be written: {error.strerror or error}. "
        f"Nothing was written under the final name.{what_next}"
    )


def _files_of(prefix: str) -> tuple[Path, Path, Path]:
    return bin_path(prefix), idx_path(prefix), manifest_path(prefix)
