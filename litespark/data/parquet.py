"""Rows of a parquet file as JSON lines, so that everything after the reader sees one format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

from litespark.errors import MissingExtraError, UserError

_ROWS_AT_ONCE = 256  # of some kilobytes each; a column chunk itself is read page by page


def parquet_lines(path: str, columns: Sequence[str], file: BinaryIO) -> Iterator[bytes]:
    """Yield the rows of a parquet file as JSON lines, some rows at a time.

    Args:
        path: for messages.
        columns: those to read; all when empty.
        file: the file, open; it is closed at the end.

    Raises:
        UserError: when the file is damaged, has no such column, or pyarrow is not installed.
    """
    import orjson

    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", f"--input {path}") from error
    try:
        with file:
            table = parquet.ParquetFile(file, pre_buffer=False)
            present = table.schema_arrow.names
            missing = [name for name in columns if name not in present]
            if missing:
                raise UserError(
                    path,
                    f"has no column {missing[0]!r} (its columns: {', '.join(present[:8])})",
                    "Name a column of text with --json-key.",
                )
            chosen = list(columns) or None
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=chosen):
                rows = batch.to_pylist()
                yield b"".join(orjson.dumps(row) + b"\n" for row in rows)
    except (pyarrow.ArrowException, OSError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            path, f"cannot be read to its end: {error}", "Fetch or write the file again."
        ) from error
