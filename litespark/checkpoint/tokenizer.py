"""Where a checkpoint's tokenizer is: an import keeps it in the checkpoint, a run names it."""

from __future__ import annotations

from pathlib import Path

TOKENIZER = "tokenizer"


def find_tokenizer(checkpoint: Path, named: str | None) -> str | None:
    """The tokenizer that a run names, else the folder in the checkpoint; None: neither."""
    if named is not None:
        return named
    held = checkpoint / TOKENIZER
    return str(held) if held.is_dir() else None
