"""A checkpoint that was damaged on disk ends with one message, on resume and on generation."""

from __future__ import annotations

import pytest
import yaml

from tests.support import cli
from tests.support.runs import config_tree, write_shard

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tree = config_tree(folder, write_shard(folder / "tokens"))
    tree["training"]["steps"] = 2
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    assert cli.run("train", str(folder / "run.yaml")).returncode == 0
    return folder


def damage(state, kind: str):
    """Damage one file of a checkpoint and return its former content."""
    how, name = kind.split()
    path = state / name
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "garbage":
        path.write_bytes(b"hello")
    else:
        path.unlink()
    return path, content


DAMAGES = [
    *("missing .metadata", "cut .metadata", "garbage .metadata"),
    *("missing common.pt", "cut common.pt", "garbage common.pt"),
    *("missing __0_0.distcp", "cut __0_0.distcp", "garbage metadata.json"),
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_message_with_the_folder(kind, trained):
    state = trained / "run" / "checkpoints" / "step_000000002" / "state"
    path, content = damage(state, kind)
    try:
        ended = cli.run("train", str(trained / "run.yaml"), "training.steps=3")
    finally:
        path.write_bytes(content)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("litespark: error")]
    assert len(said) == 1
    assert str(state) in said[0]
