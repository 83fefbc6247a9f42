"""Saves while training goes on: what is written is the state of the step, and only a durable
checkpoint gets a name."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.runs import config_tree, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("background")
    tree = config_tree(folder, write_shard(folder / "tokens"))
    tree["model"].update(num_layers=2, hidden_size=32, ffn_hidden_size=32, num_attention_heads=4)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


class Gate:
    """Holds back this rank's writing until it is opened, or makes it fail."""

    def __init__(self, error: OSError | None = None) -> None:
        from litespark.checkpoint import host_copy, save

        self.opened, self.error = threading.Event(), error
        self.entered, self.left = threading.Event(), threading.Event()
        self.original = host_copy.write_shards  # not what an earlier gate has put in its place
        save.write_shards = self.write

    def write(self, copy: Any, folder: Path) -> Any:
        self.entered.set()
        before = contents(copy)
        assert self.opened.wait(60)
        assert contents(copy) == before, "overwritten by the next save before it was written"
        if self.error is not None:
            raise self.error
        written = self.original(copy, folder)
        self.left.set()
        return written


def contents(copy: Any) -> list[bytes]:
    items = [item for bucket in copy.buckets for _, item in bucket]
    return [
        item.reshape(-1).view(torch.uint8).numpy().tobytes()
        for item in items
        if isinstance(item, torch.Tensor)
    ]


def start(config_path: str, overrides: list[str]) -> tuple[Any, Any, list[str]]:
    """A run with its checkpointing hook, and what is logged of checkpoints from now on."""
    from litespark.config import load_config
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.setup import set_up

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("litespark.checkpoint")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    run = set_up(load_config(config_path, overrides))
    hook = Checkpointing()
    hook.on_start(run)
    return run, hook, said


def names(run: Any) -> list[str]:
    folder = run.folder / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def shards(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(checkpoint.glob("state/*.distcp"))}


def steps_during_a_save_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str]
) -> tuple[list[str], list[str], list[str]]:
    """Save step 2, train on while nothing is written yet, then let it be written."""
    from litespark.training.step import train_step

    run, hook, said = start(config_path, overrides)
    train_step(run), train_step(run)
    gate = Gate()
    hook.save(run)
    for _ in range(4):
        train_step(run)
    before = names(run)
    said_before = list(said)
    gate.opened.set()
    hook.saver.wait()
    run.train_batches.close() if run.train_batches is not None else None
    return before, said_before, said


def save_two_rank(rank: int, world_size: int, config_path: str, overrides: list[str]) -> None:
    """Save step 2 while nothing else goes on; the memory it takes is what would be got ready."""
    from litespark.checkpoint.host_copy import own_bytes
    from litespark.checkpoint.sharded import run_tensors
    from litespark.training.step import train_step

    run, hook, _ = start(config_path, [*overrides, "checkpoint.asynchronous=false"])
    train_step(run), train_step(run)
    hook.save(run)
    assert hook.saver._buffers._block.numel() == own_bytes(run_tensors(run.chunks, run.optimizer))
    run.train_batches.close() if run.train_batches is not None else None


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout", [[], ["parallel.distributed_optimizer=false"], ["parallel.tensor=2"]], ids=str
)
def test_steps_taken_meanwhile_do_not_reach_the_checkpoint(layout, mode, config_path, tmp_path):
    options = [*layout, f"precision.mode={mode}"]
    folders = [tmp_path / "meanwhile", tmp_path / "still"]
    found = run_distributed(
        steps_during_a_save_rank, 2, config_path, [*options, f"run.output_dir={folders[0]}"]
    )
    run_distributed(save_two_rank, 2, config_path, [*options, f"run.output_dir={folders[1]}"])
    for rank, (before, said_before, said) in enumerate(found):
        assert not [name for name in before if not name.startswith(".")], "named before durable"
        assert said_before == []
        assert len(said) == (rank == 0)
    assert "saved step_000000002" in found[0][2][0]
    written, wanted = (shards(folder / "checkpoints/step_000000002") for folder in folders)
    assert written == wanted
    assert len(written) > 1


def one_rank_lags_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str]
) -> list[list[str]]:
    """One rank has not written yet; the others have.  Then the next save has to wait."""
    import time

    import torch.distributed as dist

    from litespark.training.step import train_step

    run, hook, said = start(config_path, overrides)

    def open_when_waited_for(gate: Gate) -> None:
        while not run.progress.is_suspended:
            time.sleep(0.01)
        gate.opened.set()

    seen = []
    for step in (1, 2, 3):
        train_step(run)
        gate = Gate()
        if rank == 0 or step == 1:
            gate.opened.set()
        hook.save(run)
        if step == 1:
            hook.saver.wait()
        # Rank 0 has written its part; another has come to where it must wait.
        assert (gate.left if gate.opened.is_set() else gate.entered).wait(60)
        dist.barrier()
        seen.append([name for name in names(run) if not name.endswith(".writing")])
        threading.Thread(target=open_when_waited_for, args=(gate,), daemon=True).start()
    hook.save_now(run)
    run.train_batches.close()
    return [*seen, names(run), said]


def test_latest_waits_for_every_rank_and_a_save_for_the_one_before(config_path, tmp_path):
    options = [f"run.output_dir={tmp_path}", "checkpoint.keep_last=1"]
    found = run_distributed(one_rank_lags_rank, 2, config_path, options)
    first, second, third, end, _ = found[0]
    assert first == ["latest", "step_000000001"]
    assert second == first, "the old one stays until the new one is durable on every rank"
    assert third == ["latest", "step_000000002"], "the third save waited for the second"
    assert end == ["latest", "step_000000003"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000000003\n"
    waits = [line for line in found[1][-1] if "waited" in line and "for the one before" in line]
    assert len(waits) == 1
    assert "the save of step 3 waited" in waits[0]


def failing_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str]
) -> tuple[list[str], list[str], str]:
    """The save of step 2 fails on rank 1 alone; step 3's succeeds; step 4's fails at the end."""
    from litespark.errors import LitesparkError
    from litespark.training.step import train_step

    run, hook, said = start(config_path, overrides)
    after_failure: list[str] = []
    for step in (1, 2, 3, 4):
        train_step(run)
        fails = step in (2, 4) and rank == 1
        Gate(OSError(28, "No space left on device") if fails else None).opened.set()
        hook.save(run)
        hook.saver.wait()
        if step == 2:
            after_failure = names(run)
    try:
        hook.on_end(run)
    except LitesparkError as error:
        last = str(error)
    else:
        last = "no error"
    run.train_batches.close()
    return after_failure, said, last


def test_a_fault_of_one_rank_ends_the_save_on_all_and_no_more(config_path, tmp_path):
    found = run_distributed(failing_rank, 2, config_path, [f"run.output_dir={tmp_path}"])
    for after_failure, _, last in found:
        assert after_failure == ["latest", "step_000000001"], "nothing half-written stays"
        assert "step 4 could not be saved" in last
        assert "No space left on device" in last
    said = found[0][1]
    assert sum("step 2 could not be saved" in line for line in said) == 1
    assert sum("saved step_000000003" in line for line in said) == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        *("latest", "step_000000001", "step_000000003")
    ]
