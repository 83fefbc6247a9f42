"""Whether all ranks run the same code with the same configuration and packages.

Nodes are given their code one by one, and one that was forgotten trains along with other
arithmetic, or waits for ever in a collective that the others do not know.  Each rank therefore
makes a hash of what it runs; only where they differ are the details exchanged, to say what differs
and where.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import litespark
import megatron_patches
from litespark.config.schema import RunConfig
from litespark.errors import UserError
from litespark.parallel.groups import gather_objects

_PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine", "flash-attn-4", "triton")
_NAMED = 5  # differences, and hosts of each, that a message names
Facts = dict[str, str]

_FIXES = {
    "code": "Give every node the same commit, or one folder that all of them see.",
    "configuration": "Type the same configuration file and overrides on every node.",
    "packages": "Install the same versions on every node.",
}


def check_same_everywhere(
    config: RunConfig, gather: Callable[[Any], list[Any]] = gather_objects
) -> None:
    """Compare this rank's code, configuration and packages with all others'.

    Raises:
        UserError: on every rank alike, if they differ; it names what and the nodes.
    """
    facts = {
        "code": code_facts(),
        "configuration": dict(_flat(config.model_dump(by_alias=True, mode="json"), "")),
        "packages": package_facts(),
    }
    host = socket.gethostname()
    digests = {name: _digest(values) for name, values in facts.items()}
    answers = gather((host, digests))
    differing = [name for name in facts if len({digests[name] for _, digests in answers}) > 1]
    if not differing:
        return
    details = gather((host, {name: facts[name] for name in differing}))
    # Of code that differs nothing else can be expected to agree.
    name = differing[0]
    error = describe_difference(name, [(host, facts[name]) for host, facts in details])
    error.on_every_rank = True
    raise error


def code_facts() -> Facts:
    """The SHA-256 of every source file of Litespark, by its path."""
    facts = {}
    for package in (litespark, megatron_patches):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            name = f"{root.name}/{path.relative_to(root).as_posix()}"
            facts[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return facts


def package_facts() -> Facts:
    """The versions of what computes."""
    facts = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def describe_difference(
    kind: str, facts_of_ranks: Sequence[tuple[str, Mapping[str, str]]]
) -> UserError:
    """The message for facts that are not the same on all ranks, given as (host, facts)."""
    keys = sorted({key for _, facts in facts_of_ranks for key in facts})
    lines = []
    for key in keys:
        hosts: dict[str, list[str]] = {}
        for host, facts in facts_of_ranks:
            places = hosts.setdefault(facts.get(key, "missing"), [])
            if host not in places:
                places.append(host)
        if len(hosts) > 1:
            told = "; ".join(f"{value} on {_some(names)}" for value, names in hosts.items())
            lines.append(f"{key} is {told}")
    more = f", and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return UserError(
        f"the {kind} {'are' if kind == 'packages' else 'is'} not the same on all nodes",
        ", ".join(lines[:_NAMED]) + more,
        _FIXES[kind],
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
