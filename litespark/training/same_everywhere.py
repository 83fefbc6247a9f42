"""Whether all ranks run the same code with the same configuration, and write into one folder.

Nodes are given their code one by one, and one that was forgotten trains along with other
arithmetic, or waits for ever in a collective that the others do not know.  Each rank therefore
makes a hash of what it runs; only where they differ are the details exchanged, to say what differs
and where.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from litespark.config.schema import RunConfig
from litespark.errors import UserError
from litespark.parallel.groups import gather_objects
from litespark.utils.facts import Facts, code_facts, differences, package_facts

_NAMED = 5  # differences, and nodes, that a message names
_FOLDER_SECONDS = 40.0  # an NFS client asks again after 30 s at the latest

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
    # Where the code differs, nothing else can be expected to agree.
    kind = differing[0]
    lines = differences([(host, facts[kind]) for host, facts in details])
    more = f", and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    error = UserError(
        f"{kind}: not the same on all nodes", ", ".join(lines[:_NAMED]) + more, _FIXES[kind]
    )
    error.on_every_rank = True
    raise error


def check_same_folder(
    folder: Path, *, is_first: bool, gather: Callable[[Any], list[Any]] = gather_objects
) -> None:
    """Whether what the first rank writes into the run's folder is seen by all.

    Every rank writes its part of a checkpoint there, and the first one gives it its name.

    Raises:
        UserError: on every rank alike; it names the nodes that have a folder of their own.
    """
    mark = folder / gather(f".start-{secrets.token_hex(4)}")[0]
    if is_first:
        mark.touch()
    gather(None)  # it is there now
    answers = gather((socket.gethostname(), _is_seen(mark)))
    if is_first:
        mark.unlink(missing_ok=True)
    blind = list(dict.fromkeys(host for host, sees in answers if not sees))
    if blind:
        error = UserError(
            f"run.output_dir = {folder}",
            f"is another folder on {', '.join(blind[:_NAMED])} than on {answers[0][0]}",
            "Give a folder on a file system that all nodes share.",
        )
        error.on_every_rank = True
        raise error


def _is_seen(path: Path) -> bool:
    """Whether a file that exists shows up here; network file systems remember that it did not."""
    deadline = time.monotonic() + _FOLDER_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
