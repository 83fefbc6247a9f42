"""Reads a run's YAML and the command line's `section.key=value`, and explains every mistake.

Errors carry the line of the YAML file, the key with its value, and the nearest right spelling.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from litespark.config.schema import RunConfig
from litespark.errors import UserError, raise_user_errors

Path_ = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as in YAML 1.2 and as everybody expects."""


# A copy: the resolvers of the parent class are shared by every user of PyYAML in this process.
_Loader.yaml_implicit_resolvers = {
    key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides, and check every key and type.

    Raises:
        UserError: the file cannot be read or parsed, or a key or value is wrong.
    """
    path = Path(path)
    tree, lines = _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override, lines)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise_user_errors([_explain(detail, path, lines) for detail in error.errors()])
        raise AssertionError("a validation error holds at least one detail") from error


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(by_alias=True, mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            str(path), f"cannot be read ({reason})", "Give the path of a YAML configuration."
        ) from None
    try:
        root = yaml.compose(text, Loader=_Loader)
        lines_of = list(_walk(root, ())) if root is not None else []
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(where, f"is not valid YAML ({problem})", "Mend the line.") from None
    if not isinstance(tree, dict) or root is None:
        raise UserError(
            str(path), "is not a YAML mapping", "Write sections such as `model:` with keys below."
        )
    lines: dict[Path_, int] = {}
    for key_path, line in lines_of:
        if key_path in lines:
            name = ".".join(map(str, key_path))
            raise UserError(
                f"{path}:{line}: {name}",
                f"stands twice (first in line {lines[key_path]})",
                "Delete one of the two.",
            )
        lines[key_path] = line
    return tree, lines


def _walk(node: yaml.Node, path: Path_) -> Iterator[tuple[Path_, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            yield below, key.start_mark.line + 1
            yield from _walk(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1
            yield from _walk(value, (*path, index))


def _apply_override(tree: dict[str, Any], override: str, lines: dict[Path_, int]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"override '{override}'", "has no '='", "Write section.key=value, e.g. batch.micro=2."
        )
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError:
        raise UserError(
            f"override '{override}'", "has a value that is not YAML", "Quote the value."
        ) from None
    path = tuple(key.split("."))
    node = tree
    for part in path[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(
                f"override '{override}'",
                f"'{part}' is not a section",
                "Lists are given whole, e.g. 'data.split=[98,2,0]'.",
            )
        node = child
    node[path[-1]] = value
    lines.pop(path, None)  # the value no longer comes from the file


def _explain(detail: Any, file: Path, lines: dict[Path_, int]) -> UserError:
    """One pydantic error as a message in the user's words."""
    path: Path_ = tuple(detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind == "unknown_preset":
        path, value = (*path, "preset"), detail["ctx"]["preset"]
    name = ".".join(map(str, path))
    line = lines.get(path)
    prefix = f"{file}:{line}: " if line else ""
    if kind == "missing":
        line = lines.get(path[:-1])
        prefix = f"{file}:{line}: " if line else f"{file}: "
        return UserError(f"{prefix}{name}", "is missing", f"{_describe(path)}")
    where = f"{prefix}{name} = {_short(value)}"
    if kind == "unknown_preset":
        known = detail["ctx"]["known"]
        return UserError(
            where,
            "is no known preset",
            f"{_nearest(str(value), known)}Known: {', '.join(known)}.",
        )
    if kind == "extra_forbidden":
        return _unknown_key(prefix, path)
    problem = detail["msg"].replace("Input should be", "should be")
    return UserError(where, problem[0].lower() + problem[1:], f"{_describe(path)}")


def _unknown_key(prefix: str, path: Path_) -> UserError:
    siblings = list(_keys_of(_section_at(path[:-1])))
    wanted = str(path[-1])
    full_names = [".".join(p) for p in _all_keys(RunConfig, ())]
    elsewhere = [name for name in full_names if name.rsplit(".", 1)[-1] == wanted]
    fix = f"Did you mean '{elsewhere[0]}'? " if elsewhere else _nearest(wanted, siblings)
    section = ".".join(map(str, path[:-1])) or "the top level"
    known = f"Keys of {section}: {', '.join(siblings)}."
    return UserError(f"{prefix}{'.'.join(map(str, path))}", "is no known key", f"{fix}{known}")


def _nearest(word: str, candidates: Any) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'? " if close else ""


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict) else "a mapping"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(path: Path_) -> str:
    """What the field is for, from its description in the schema."""
    section = _section_at(path[:-1])
    if section is not None:
        for name, field in section.model_fields.items():
            if (field.alias or name) == path[-1] and field.description:
                return f"It is: {field.description.rstrip('.')}."
        if not path[:-1] or isinstance(path[-1], str):
            return f"Give the section or key '{path[-1]}'."
    return "Mend the value."


def _section_at(path: Path_) -> type[BaseModel] | None:
    section: type[BaseModel] | None = RunConfig
    for part in path:
        if isinstance(part, int):
            continue
        found = None
        for name, field in section.model_fields.items() if section else ():
            if (field.alias or name) == part:
                found = _model_in(field.annotation)
        section = found
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def _keys_of(section: type[BaseModel] | None) -> Iterator[str]:
    for name, field in section.model_fields.items() if section else ():
        yield field.alias or name


def _all_keys(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        below = (*path, field.alias or name)
        yield below
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, below)
