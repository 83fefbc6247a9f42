"""`litespark data copy`: shards from object storage to the disk, and back."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from litespark.cli.arguments import add_command, add_shards_argument
from litespark.cli.exits import unwind_on_sigterm
from litespark.cli.progress import byte_bar
from litespark.errors import UserError

_DESCRIPTION = """\
Copy shards from S3, or a compatible store, to a local folder, or from the disk to a store.

A run reads its shards from the disk (or a shared file system), so those in a store are fetched
first.  What arrives is compared with the checksums of the manifest; a shard appears whole, or not
at all.

Needs pip install 'litespark[s3]'.  Credentials come from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY), ~/.aws or the machine's role; AWS_ENDPOINT_URL names a compatible store.
"""

_EPILOG = """\
examples:
  litespark data copy s3://bucket/shards/corpus_text_document data/
  litespark data copy data/a_text_document data/b_text_document s3://bucket/shards/

exit codes: 0 done, 2 a shard is missing, damaged or there already, 1 anything else (disk full, the
store refuses).
"""


def add_copy_parser(actions: Any) -> None:
    """Add the parser of `copy` to those of `litespark data`."""
    parser = add_command(
        actions,
        "copy",
        summary="fetch shards from object storage, or send them there",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_shards_argument(parser)
    parser.add_argument("folder", metavar="FOLDER", help="where to; shards keep their names")
    parser.set_defaults(run=run_copy)


def run_copy(args: argparse.Namespace) -> int:
    """Copy each shard; return 0.

    Raises:
        LitesparkError: see `litespark.data.transfer`.
    """
    from litespark.data.index_file import unreadable_shard
    from litespark.data.storage import is_remote, require_storage
    from litespark.data.transfer import download_shard, upload_shard

    is_upload = is_remote(args.folder)
    for prefix in args.prefixes:
        if is_remote(prefix) == is_upload:
            raise UserError(
                f"{prefix} to {args.folder}",
                "are both in a store" if is_upload else "are both local",
                "Give one side as s3://...; other copies are the work of other tools.",
            )
    require_storage()
    unwind_on_sigterm()
    with byte_bar("copying") as bar:
        for number, prefix in enumerate(args.prefixes, start=1):
            bar.rename(f"{number}/{len(args.prefixes)} {prefix}")
            name = os.path.basename(prefix)
            if is_upload:
                target = f"{args.folder.rstrip('/')}/{name}"
                try:
                    upload_shard(prefix, target, False, bar.begin, bar.advance)
                except OSError as error:
                    raise unreadable_shard(prefix, error) from error
            else:
                target = os.path.join(args.folder, name)
                download_shard(prefix, target, bar.begin, bar.advance)
            sys.stdout.write(f"{prefix} -> {target}\n")
    return 0
