"""The families that can be exchanged, and which one a folder or a model is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from litespark.checkpoint.hf.config_json import NOT_COMPUTED, ConfigJson
from litespark.checkpoint.hf.families.llama import LLAMA
from litespark.checkpoint.hf.families.mistral import MISTRAL
from litespark.checkpoint.hf.families.qwen2 import QWEN2
from litespark.checkpoint.hf.families.qwen3 import QWEN3
from litespark.checkpoint.hf.family import Family
from litespark.config.schema import ModelConfig
from litespark.errors import UserError

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of_model(model: ModelConfig) -> Family:
    """The family that a model is exported as."""
    return FAMILIES[model.hf_family]


def family_of_config(config: ConfigJson) -> Family:
    """The family that a config.json names: by `architectures`, without it by `model_type`.

    Raises:
        UserError: it is none of those that Litespark computes.
    """
    stated = config.get("architectures")
    if isinstance(stated, list) and stated:
        for family in FAMILIES.values():
            if stated == [family.architecture]:
                config.require("model_type", family.name, None)
                return family
        raise config.refusal("architectures", "is not supported", NOT_COMPUTED)
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise config.refusal("model_type", "is not supported", NOT_COMPUTED)
    return FAMILIES[name]


def read_model(folder: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder.

    Raises:
        UserError: config.json is missing, damaged, or of a model that Litespark does not compute.
    """
    config = ConfigJson.read(folder)
    family = family_of_config(config)
    values = family.read(config.with_defaults(family.defaults))
    heads, groups = values["num_attention_heads"], values["num_query_groups"]
    if heads % groups:
        raise config.refusal("num_key_value_heads", f"does not divide {heads}", "Repair the file.")
    try:
        return ModelConfig.model_validate({**values, "family": family.name})
    except ValidationError as error:
        problem = "; ".join(f"{e['loc']}: {e['msg']}" for e in error.errors()[:3])
        raise UserError(
            str(config.path), f"is of no possible model ({problem})", "Repair it."
        ) from None


def config_json(
    model: ModelConfig, dtype_name: str, bos_id: int | None, eos_id: int | list[int] | None
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        model: the shape.
        dtype_name: format of the exported weights, e.g. `bfloat16`; stands there in the words of
            transformers 4 (`torch_dtype`) and 5 (`dtype`).
        bos_id: the tokenizer's id for the begin of a text; None when unknown.
        eos_id: the same for the end, or several.
    """
    family = family_of_model(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.write(model),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }
