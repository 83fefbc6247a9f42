"""The smallest configuration file, and loading one with overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from litespark.config import load_config
from litespark.config.schema import RunConfig

MINIMAL = """\
run: {output_dir: out}
model: {preset: tiny}
data:
  blend: [{prefix: shard}]
  sequence_length: 64
batch: {global: 8}
optimizer: {lr: 1e-3}
training: {steps: 10}
"""


def loader(folder: Path, text: str = MINIMAL) -> Callable[..., RunConfig]:
    """A function of overrides, which loads `text` from a file in `folder` with them."""
    path = folder / "run.yaml"
    path.write_text(text)
    return lambda *overrides: load_config(path, list(overrides))
