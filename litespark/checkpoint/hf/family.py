"""What Litespark must know of a model family to exchange it with Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from litespark.checkpoint.hf.config_json import ConfigJson
from litespark.checkpoint.hf.table import Entry, entries_of
from litespark.config.schema import ModelConfig


@dataclass(frozen=True)
class Family:
    """A table of tensors and a translation of the shape.

    Attributes:
        name: `model_type` in config.json and `model.family` in Litespark's configuration.
        architecture: the class in transformers.
        table: rows in the order of the forward pass, which is the order of the exported files.
        defaults: what transformers assumes for keys that a config.json leaves out.
        read: the keys of the `model` section that follow from a config.json; refuses what is not
            computed.
        write: the keys of config.json that follow from the `model` section, names aside.
    """

    name: str
    architecture: str
    table: tuple[Entry, ...]
    defaults: Mapping[str, Any]
    read: Callable[[ConfigJson], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]

    def entries(self, model: ModelConfig) -> tuple[Entry, ...]:
        """The rows that a model of this shape has."""
        return entries_of(self.table, model)
