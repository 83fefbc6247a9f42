"""Several hosts, a real Slurm, a slow network: for `make test-launch`, as they take minutes.

Each host is a network namespace; see tests/support/hosts.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import hosts as network
from tests.support.runs import config_tree, write_shard


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is asked for nowhere, or cannot be had here, and say so."""
    reason = network.why_not()
    if os.environ.get("LITESPARK_TEST_LAUNCH") != "1":
        reason = "takes minutes: make test-launch"
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.timeout(1800))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def hosts(tmp_path) -> Iterator[Callable[..., network.Hosts]]:
    """Makes hosts of the names it is given."""
    made: list[network.Hosts] = []

    def build(*names: str) -> network.Hosts:
        made.append(network.Hosts(tmp_path, names))
        made[0].build()
        return made[0]

    yield build
    for one in made:
        one.tear_down()


@pytest.fixture
def configuration(tmp_path) -> Callable[..., Path]:
    """Writes a run's configuration, with `training` and `resilience` as given."""

    def write(steps: int, **resilience: float) -> Path:
        tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
        tree["model"]["num_layers"] = 2
        tree["training"] = {"steps": steps, "save_every": 2}
        tree["resilience"] = resilience
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write
