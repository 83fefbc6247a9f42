"""What this process runs (code, versions), as small facts that nodes can compare."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine", "flash-attn-4", "triton")
_HOSTS_NAMED = 5

Facts = Mapping[str, str]


def code_facts() -> dict[str, str]:
    """The SHA-256 of every source file of Litespark, by its path."""
    facts = {}
    for package in ("litespark", "megatron_patches"):
        spec = find_spec(package)
        root = Path(str(spec.origin if spec else None)).parent
        for path in sorted(root.rglob("*.py")):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            facts[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return facts


def package_facts() -> dict[str, str]:
    """The versions of what computes."""
    facts = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def differences(facts_of_ranks: Sequence[tuple[str, Facts]]) -> list[str]:
    """`KEY is VALUE on HOST, HOST; VALUE on HOST` for what is not the same everywhere.

    Args:
        facts_of_ranks: the host and the facts of each rank.
    """
    lines = []
    for key in sorted({key for _, facts in facts_of_ranks for key in facts}):
        hosts: dict[str, list[str]] = {}
        for host, facts in facts_of_ranks:
            places = hosts.setdefault(facts.get(key, "missing"), [])
            if host not in places:
                places.append(host)
        if len(hosts) > 1:
            told = "; ".join(f"{value} on {_some(names)}" for value, names in hosts.items())
            lines.append(f"{key} is {told}")
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _HOSTS_NAMED} more" if len(names) > _HOSTS_NAMED else ""
    return ", ".join(names[:_HOSTS_NAMED]) + more
