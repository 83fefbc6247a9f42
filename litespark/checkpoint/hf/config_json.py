"""`config.json` and the `model` section, in both directions: what all families share.

A folder may have been downloaded, so every value is checked for its type before it is used, and
what Litespark does not compute (another activation, another kind of RoPE, biases where there are
none) is refused by name: a model that is read without one of its parts gives plausible nonsense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litespark.config.schema import ModelConfig
from litespark.errors import UserError

FILE_NAME = "config.json"
_MAX_BYTES = 16 << 20
_LARGEST = 1 << 40  # beyond any real size; products of such sizes still fit Python's memory
NOT_COMPUTED = "Litespark computes Llama 2 and 3, Mistral, Qwen2, Qwen2.5 and dense Qwen3."


class ConfigJson:
    """Checked access to the values of a `config.json`.

    Args:
        path: of the file; for messages.
        values: its content.
        defaults: what transformers assumes for keys that the file leaves out.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self._values, self._defaults = path, values, defaults or {}

    @classmethod
    def read(cls, folder: Path) -> ConfigJson:
        """The file of a folder.

        Raises:
            UserError: it is missing or no JSON object.
        """
        path = folder / FILE_NAME
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES} bytes")
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                str(path), f"cannot be read ({error})", "Give a folder as save_pretrained makes it."
            ) from None
        return cls(path, values)

    def with_defaults(self, defaults: Mapping[str, Any]) -> ConfigJson:
        """The same values over a family's defaults."""
        return ConfigJson(self.path, self._values, defaults)

    def get(self, name: str) -> Any:
        """A value of any type; None where it is missing."""
        return self._values.get(name, self._defaults.get(name))

    def integer(self, name: str) -> int:
        """A whole number above 0."""
        value = self.get(name)
        if type(value) is not int or not 0 < value < _LARGEST:
            raise self.refusal(name, "is no whole number above 0", "Repair the file.")
        return value

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.get(name)
        is_number = type(value) in (int, float) and 0 < value < float("inf")
        if not is_number or not math.isfinite(value):
            raise self.refusal(name, "is no number above 0", "Repair the file.")
        return float(value)

    def boolean(self, name: str) -> bool:
        """true or false; null counts as false."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise self.refusal(name, "is neither true nor false", "Repair the file.")
        return bool(value)

    def section(self, name: str) -> ConfigJson | None:
        """An object within the object; None where it is missing, null or empty."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, "is no object", "Repair the file.")
        return ConfigJson(self.path, value, {}) if value else None

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse every other value of a key."""
        if self.get(name) not in allowed:
            raise self.refusal(name, "is not supported", NOT_COMPUTED)

    def refusal(self, name: str, problem: str, fix: str) -> UserError:
        """The error that names a key and its value."""
        value = self.get(name)
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        what = "is missing" if value is None else problem
        return UserError(f"{self.path}: {name} = {shown}", what, fix)


def read_shape(config: ConfigJson) -> dict[str, Any]:
    """The keys of the `model` section that all families write alike.

    Raises:
        UserError: a value is missing, of another type, or of something that is not computed.
    """
    config.require("hidden_act", "silu")
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, False, None)
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    groups, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    if head_dim is None and hidden % heads:
        raise config.refusal("hidden_size", f"is not divisible by {heads} heads", "Give head_dim.")
    return {
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": heads if groups is None else config.integer("num_key_value_heads"),
        "head_dim": hidden // heads if head_dim is None else config.integer("head_dim"),
        "vocab_size": config.integer("vocab_size"),
        "max_sequence_length": config.integer("max_position_embeddings"),
        "norm_epsilon": config.number("rms_norm_eps"),
        "tie_embeddings": config.boolean("tie_word_embeddings"),
        "init_std": config.number("initializer_range"),
        **_read_rope(config),
    }


def _read_rope(config: ConfigJson) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    theta_of = new if new is not None and new.get("rope_theta") is not None else config
    theta = theta_of.number("rope_theta")
    scaling = new if new is not None else old
    for each in (config, new, old):
        if each is not None:
            each.require("partial_rotary_factor", None, 1, 1.0)
    if scaling is None:
        return {"rope_theta": theta}
    kind = "rope_type" if scaling.get("rope_type") is not None else "type"
    scaling.require(kind, "default", "llama3", None)
    if scaling.get(kind) != "llama3":
        return {"rope_theta": theta}
    return {
        "rope_theta": theta,
        "rope_scaling": {
            "factor": scaling.number("factor"),
            "low_freq_factor": scaling.number("low_freq_factor"),
            "high_freq_factor": scaling.number("high_freq_factor"),
            "original_max_sequence_length": scaling.integer("original_max_position_embeddings"),
        },
    }


def write_shape(model: ModelConfig) -> dict[str, Any]:
    """What all families write alike.

    Rotary frequencies stand there twice, in the words of transformers 4 (`rope_theta`,
    `rope_scaling`) and of transformers 5 (`rope_parameters`), with equal values: each version
    reads its own and ignores or agrees with the other.
    """
    scaling = _rope_scaling(model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": model.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "use_cache": True,
    }


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_sequence_length,
    }
