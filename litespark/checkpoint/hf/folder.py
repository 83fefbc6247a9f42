"""What an exported folder holds beside the weights, and how it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from litespark.checkpoint.run_state import RunState
from litespark.data.tokenizers import Tokenizer
from litespark.errors import LitesparkError, UserError
from litespark.utils.files import (
    atomic_write,
    fsync_path,
    rename_durably,
    temporary_name,
    write_text_atomically,
)

TOKENIZER_CONFIG = "tokenizer_config.json"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends, or vanishes if it raises.

    Raises:
        UserError: `folder` is taken (it holds something, or is a file) or cannot be made.
        LitesparkError: the disk is full.
    """
    refuse_taken(folder)
    final = Path(os.path.realpath(folder))  # a link to an empty folder stays a link
    temporary = temporary_name(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(
            str(folder),
            f"cannot be made ({error.strerror})",
            "Give a folder in a place that can be written to.",
        ) from None
    try:
        yield temporary
        fsync_path(temporary)
        rename_durably(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise LitesparkError(f"{folder}: writing failed, nothing was kept ({error})") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_taken(folder: Path) -> None:
    """Refuse a folder in which something would be overwritten.

    Raises:
        UserError: `folder` holds something, or is a file.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise UserError(
            str(folder),
            "is not empty" if folder.is_dir() else "is a file",
            "Give a folder that does not exist yet.",
        )


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
        "architecture": "LlamaForCausalLM",
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
