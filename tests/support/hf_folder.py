"""A small folder as Hugging Face's tools write it, and ways to spoil it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.tiny import write_tokenizer
from tools.checks.hf_cases import Case, make

CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
GENERATION = {"bos_token_id": 0, "eos_token_id": [0, 5], "temperature": 0.6}


def write_hf_folder(folder: Path, family: str = "llama", variant: str = "odd vocabulary") -> Path:
    """A model with tokenizer, chat template and generation config; the folder."""
    case = Case(family, variant, str(folder))
    make(case)
    write_tokenizer(case.hf)
    (case.hf / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (case.hf / "generation_config.json").write_text(json.dumps(GENERATION))
    return case.hf


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of model.safetensors, which keeps its data."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
