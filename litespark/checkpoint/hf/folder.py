"""What an exported folder holds beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litespark.checkpoint.hf.registry import family_of_model
from litespark.checkpoint.run_state import RunState
from litespark.data.tokenizers import Tokenizer
from litespark.errors import UserError
from litespark.utils.files import atomic_write, write_text_atomically

GENERATION_CONFIG = "generation_config.json"
MANIFEST = "manifest.json"
VERIFICATION = "verification.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """How to generate: the file beside the tokenizer, if there is one, else where texts end.

    Raises:
        UserError: the file beside the tokenizer is no JSON object.
    """
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    path = tokenizer.path.with_name(GENERATION_CONFIG)
    if not path.is_file():
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(path), f"is no JSON object ({error})", "Repair or remove it.") from None
    return content


def write_manifest(folder: Path, files: Mapping[str, tuple[int, str]], **about: Any) -> None:
    """Write size and SHA-256 of every file; `sha256sum` computes the same."""
    listed = {
        name: {"size_bytes": size_bytes, "sha256": digest}
        for name, (size_bytes, digest) in sorted(files.items())
    }
    write_json(folder / MANIFEST, {"format_version": 1, **about, "files": listed})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as the Hugging Face tools lay it out."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, model_max_length: int) -> None:
    """Copy the tokenizer's files, under the names that transformers looks for."""
    for source in reversed(tokenizer.files):  # the model file comes first: it wins over a namesake
        is_model = source == tokenizer.path
        name = f"tokenizer{source.suffix}" if is_model else source.name
        with atomic_write(folder / name) as file:
            file.write(source.read_bytes())
    config = folder / TOKENIZER_CONFIG
    if not config.exists():
        write_json(config, _tokenizer_config(tokenizer, model_max_length))


def _tokenizer_config(tokenizer: Tokenizer, model_max_length: int) -> dict[str, Any]:
    """Says how to read a bare model file; left to guess, transformers may split text otherwise.

    No BOS is added, because Litespark's training data holds none.
    """
    if tokenizer.path.suffix == ".json":
        import tokenizers

        text_of = tokenizers.Tokenizer.from_file(str(tokenizer.path)).id_to_token
        reading: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.Load(str(tokenizer.path))
        text_of = processor.IdToPiece
        reading = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {
        **reading,
        **{field: text_of(number) for field, number in named.items() if number is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }


def model_card(state: RunState, num_parameters: int, dtype_name: str) -> str:
    """README.md: what is known about the model without asking anybody."""
    model = state.model_config()
    versions = ", ".join(f"{name} {number}" for name, number in state.versions.items())
    rows = {
        "architecture": family_of_model(model).architecture,
        "parameters": f"{num_parameters:,}",
        "layers": model.num_layers,
        "hidden size": model.hidden_size,
        "feed-forward size": model.ffn_hidden_size,
        "query heads / key-value heads": f"{model.num_attention_heads} / {model.num_query_groups}",
        "head size": model.head_dim,
        "vocabulary": model.vocab_size,
        "longest sequence": f"{model.max_sequence_length} tokens",
        "tied embeddings": "yes" if model.tie_embeddings else "no",
        "format of the weights": dtype_name,
        "precision in training": state.precision,
        "optimizer steps": f"{state.step:,}",
        "training tokens": f"{state.tokens:,}",
        "trained with": versions,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- litespark
---

# Model card

A language model trained with Litespark and exported from its checkpoint of step {state.step}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
```

Not stated here, because the checkpoint does not know it: licence, training data, intended use,
evaluation, limits.
"""
