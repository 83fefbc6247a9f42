"""Checkpoints in an object store, against a real HTTP server that speaks S3."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from litespark.checkpoint import mirror
from litespark.checkpoint.folder import complete_checkpoints, prune_checkpoints
from litespark.checkpoint.integrity import MARKER, check_whole, read_marker, write_marker
from litespark.checkpoint.mirror import (
    Mirror,
    fetch_first_whole,
    remote_checkpoints,
    send_checkpoint,
)
from litespark.config.schema import CheckpointConfig
from litespark.data import storage
from litespark.errors import LitesparkError, UserError
from litespark.training.preflight import remote_candidates
from tests.support.store import empty_bucket, running_store
from tests.unit.test_checkpoint_integrity import make

pytest.importorskip("s3fs", reason="the extra 's3' is not installed")
pytest.importorskip("moto.server", reason="moto is not installed")

BUCKET = "s3://shelf"
PLACE = f"{BUCKET}/runs/a"


@pytest.fixture(scope="module")
def server():
    with running_store() as address:
        yield address


@pytest.fixture
def store(server) -> Any:
    return empty_bucket(server, BUCKET)


@pytest.fixture
def checkpoints(tmp_path):
    """A run's folder with the checkpoints of steps 1 to 5."""
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        make(folder / f"step_{step:09d}", step)
    return folder


def step(number: int) -> str:
    return f"step_{number:09d}"


def steps(store) -> list[int]:
    """Steps of which anything is in the store."""
    names = {name.split("/")[3] for name in store.find(PLACE) if not name.endswith("/latest")}
    return sorted(int(name.removeprefix("step_")) for name in names)


def put(store, name, content):
    with store.open(f"{PLACE}/{name}", "wb") as file:
        file.write(content)


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_was_sent_comes_back_byte_for_byte(store, checkpoints, tmp_path):
    sent = send_checkpoint(checkpoints / step(3), PLACE)
    assert sent == sum(len(data) for data in content(checkpoints / step(3)).values())
    assert remote_checkpoints(PLACE) == remote_checkpoints(f"{PLACE}/") == [f"{PLACE}/{step(3)}"]
    fetched = fetch_first_whole(remote_checkpoints(PLACE), tmp_path / "new")
    assert fetched == tmp_path / "new" / step(3)
    assert content(fetched) == content(checkpoints / step(3))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["latest", step(3)]
    assert (tmp_path / "new" / "latest").read_text() == f"{step(3)}\n"


def test_the_list_of_files_is_sent_last_and_never_half(store, checkpoints, monkeypatch):
    order, upload = [], storage.upload

    def recorded(local, remote):
        order.append(remote.rpartition("/")[2])
        if len(order) == 3:
            raise OSError(0, "the cable is out", remote)
        return upload(local, remote)

    monkeypatch.setattr(storage, "upload", recorded)
    with pytest.raises(OSError, match="the cable is out"):
        send_checkpoint(checkpoints / step(1), PLACE)
    assert remote_checkpoints(PLACE) == []
    send_checkpoint(checkpoints / step(1), PLACE)
    assert order[-1] == MARKER
    assert remote_checkpoints(PLACE) == [f"{PLACE}/{step(1)}"]
    before = len(order)
    assert send_checkpoint(checkpoints / step(1), PLACE) == 0, "it is there"
    assert len(order) == before


def kept(**options) -> CheckpointConfig:
    return CheckpointConfig.model_validate({"mirror": PLACE, **options})


def test_the_store_keeps_what_the_configuration_keeps(store, checkpoints):
    outcomes = []
    running = Mirror(kept(keep_last=2, keep_every=2), outcomes.append)
    put(store, f"{step(1)}/state/__0_0.distcp", b"of an upload that was killed")
    for number in range(2, 6):
        running.offer(checkpoints / step(number))
        assert running.wait().problem == ""
    assert steps(store) == [2, 4, 5]
    assert remote_checkpoints(PLACE)[0] == f"{PLACE}/{step(5)}"
    assert [outcome.step for outcome in outcomes] == [2, 3, 4, 5]


def test_a_run_that_was_rolled_back_goes_on_from_where_it_went(store, checkpoints):
    running = Mirror(kept(keep_last=1), lambda outcome: None)
    for number in (3, 4, 5, 2):
        running.offer(checkpoints / step(number))
        running.wait()
    assert steps(store) == [2, 5], "the one gone back to was pruned, or a later one"
    assert remote_checkpoints(PLACE) == [f"{PLACE}/{step(2)}", f"{PLACE}/{step(5)}"]
    write_marker(
        checkpoints / step(5), 5, dict(list(read_marker(checkpoints / step(5)).items())[:2])
    )
    send_checkpoint(checkpoints / step(5), PLACE)  # the run has come to step 5 again
    assert remote_checkpoints(PLACE)[0] == f"{PLACE}/{step(5)}"
    assert store.cat_file(f"{PLACE}/{step(5)}/{MARKER}") == (
        (checkpoints / step(5) / MARKER).read_bytes()
    )


def damage(store, name, kind):
    whole = store.cat_file(f"{PLACE}/{name}")
    if kind == "missing":
        store.rm_file(f"{PLACE}/{name}")
    else:
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        put(store, name, {"flip": flipped, "cut": whole[:-1]}[kind])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("flip", "state/__0_0.distcp"), ("cut", "state/__0_0.distcp")),
        *(("missing", "run_state.json"), ("flip", MARKER)),
    ],
)
def test_a_damaged_one_is_named_and_the_next_taken(
    kind, name, store, checkpoints, tmp_path, caplog
):
    for number in (4, 5):
        send_checkpoint(checkpoints / step(number), PLACE)
    damage(store, f"{step(5)}/{name}", kind)
    fetched = fetch_first_whole(remote_checkpoints(PLACE), tmp_path / "new")
    assert fetched.name == step(4)
    check_whole(fetched)
    assert complete_checkpoints(tmp_path / "new") == [fetched]
    assert f"{step(5)}/{name}" in caplog.text
    damage(store, f"{step(4)}/{name}", kind)
    with pytest.raises(UserError, match="holds 2 checkpoints and each is damaged"):
        fetch_first_whole(remote_checkpoints(PLACE), tmp_path / "new2")
    assert list((tmp_path / "new2").iterdir()) == []


def test_names_in_the_store_do_not_leave_the_folder(store, checkpoints, tmp_path):
    send_checkpoint(checkpoints / step(1), PLACE)
    records = read_marker(checkpoints / step(1))
    evil = "../../../evil"
    put(store, "evil", b"e")
    hostile = tmp_path / step(1)
    hostile.mkdir()
    write_marker(hostile, 1, {**records, evil: records["run_state.json"]})
    put(store, f"{step(1)}/{MARKER}", (hostile / MARKER).read_bytes())
    with pytest.raises(UserError, match="names a file outside"):
        fetch_first_whole(remote_checkpoints(PLACE), tmp_path / "a" / "b" / "checkpoints")
    assert not list(tmp_path.rglob("evil"))
    put(store, "step_000000002x/complete.json", b"{}")
    put(store, "latest", b"../../elsewhere\n")
    assert remote_checkpoints(PLACE) == [f"{PLACE}/{step(1)}"]


def test_a_slow_store_gets_the_newest_and_what_it_reads_is_not_pruned(
    store, checkpoints, monkeypatch, caplog
):
    opened, began, send = threading.Event(), threading.Event(), mirror.send_checkpoint

    def slow(checkpoint, place):
        began.set()
        assert opened.wait(30)
        return send(checkpoint, place)

    monkeypatch.setattr(mirror, "send_checkpoint", slow)
    running = Mirror(kept(), lambda outcome: None)
    running.offer(checkpoints / step(1))
    assert began.wait(30)
    running.offer(checkpoints / step(2))
    running.offer(checkpoints / step(3))
    assert "step_000000002 is not sent" in caplog.text
    assert running.needed() == {step(1), step(3)}
    prune_checkpoints(checkpoints, 1, None, running.needed())
    assert [path.name for path in complete_checkpoints(checkpoints)] == [step(1), step(3), step(5)]
    assert running.wait(0.01) is None, "it waited for a store that does not answer"
    opened.set()
    assert running.wait().problem == ""
    assert steps(store) == [1, 3]
    assert running.needed() == set()


def test_a_store_that_is_gone_is_told_and_used_again_when_it_is_back(
    store, checkpoints, monkeypatch
):
    outcomes = []
    running = Mirror(kept(), outcomes.append)
    store.rm(BUCKET, recursive=True)
    running.offer(checkpoints / step(1))
    assert PLACE in running.wait().problem
    with pytest.raises(LitesparkError, match=r"shelf.*cannot be read"):
        remote_checkpoints(PLACE)
    store.mkdir(BUCKET)
    running.offer(checkpoints / step(2))
    assert running.wait().problem == ""
    assert [bool(outcome.problem) for outcome in outcomes] == [True, False]


def config(resume, place=PLACE) -> Any:
    return SimpleNamespace(
        run=SimpleNamespace(resume=resume), checkpoint=SimpleNamespace(mirror=place)
    )


def test_what_a_run_begins_with(store, checkpoints, caplog):
    caplog.set_level(logging.INFO)
    assert remote_candidates(config("auto"), []) == []
    send_checkpoint(checkpoints / step(1), PLACE)
    send_checkpoint(checkpoints / step(2), PLACE)
    both = [f"{PLACE}/{step(2)}", f"{PLACE}/{step(1)}"]
    assert remote_candidates(config("auto"), []) == both
    assert remote_candidates(config("auto"), [checkpoints / step(1)]) == [], "local ones first"
    assert remote_candidates(config(PLACE, None), []) == both
    assert remote_candidates(config(both[1], f"{BUCKET}/other"), []) == both[1:]
    with pytest.raises(UserError, match=r"checkpoint\.mirror already holds"):
        remote_candidates(config("never"), [])
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        remote_candidates(config(f"{BUCKET}/other", None), [])
    with pytest.raises(UserError, match=r"s3://nobody/x.*cannot be read"):
        remote_candidates(config("auto", "s3://nobody/x"), [])
