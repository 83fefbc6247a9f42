"""Published mixes of corpora, by the name users type in `data.blend.preset`.

    data:
      blend: {preset: slimpajama, prefix: data/slimpajama}

stands for one entry a sub-source, with the shard `<prefix>_<sub-source>_text_document` that
`litespark preprocess --output-prefix data/slimpajama` writes for it when it splits its input by
`meta.redpajama_set_name`.  The entries replace the short form as the configuration is read, so a
run's resolved `config.yaml` names every shard and its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticCustomError

# Per cent of the tokens, from SlimPajama-627B's data card.
BLEND_PRESETS: dict[str, dict[str, float]] = {
    "slimpajama": {
        "RedPajamaCommonCrawl": 52.2,
        "RedPajamaC4": 26.7,
        "RedPajamaGithub": 5.2,
        "RedPajamaArXiv": 4.6,
        "RedPajamaBook": 4.2,
        "RedPajamaWikipedia": 3.8,
        "RedPajamaStackExchange": 3.3,
    },
}
_KEYS = ("preset", "prefix", "json_key")


def expand_blend(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries that `{preset, prefix, json_key: text}` stands for.

    Raises:
        PydanticCustomError: a key is missing, unknown or no text, or there is no such preset.
    """
    unknown = ", ".join(str(key) for key in value if key not in _KEYS)
    if unknown:
        raise _mistake(f"has the unknown key {unknown} beside preset and prefix")
    given = {"json_key": "text", **value}
    for key in _KEYS:
        if not isinstance(given.get(key), str) or not given[key]:
            raise _mistake(f"needs a text as {key}")
    preset = given["preset"]
    if preset not in BLEND_PRESETS:
        raise PydanticCustomError(
            "unknown_preset",
            "{preset}",
            {"preset": preset, "known": list(BLEND_PRESETS)},
        )
    return [
        {"prefix": f"{given['prefix']}_{source}_{given['json_key']}_document", "weight": weight}
        for source, weight in BLEND_PRESETS[preset].items()
    ]


def _mistake(problem: str) -> PydanticCustomError:
    return PydanticCustomError("blend_preset", "{problem}", {"problem": problem})
