"""What a checkpoint must bring back beside the weights, and must not lose without a word.

Each case is a fault that a published framework had: the random state of one rank restored on all,
one more draw after a resume, moments that were left out, an exception that slips past `except`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runs import config_tree, train_and_save_rank, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume_state")
    tree = config_tree(folder, write_shard(folder / "tokens"))
    tree["model"].update(num_layers=2, hidden_size=32, ffn_hidden_size=32, num_attention_heads=4)
    tree["training"].update(eval_every=1, eval_steps=1)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def draw(rank: int) -> None:
    """A few numbers from every generator of this process, as dropout and user code would."""
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    for _ in range(rank + 1):
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()
        torch.rand(3), torch.cuda.set_rng_state(torch.cuda.get_rng_state())
        with get_cuda_rng_tracker().fork():
            torch.rand(2)


def random_states_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], stop_step: int
) -> tuple[Any, Any]:
    """The states before the first step of this start, hooks started, and after the last."""
    from litespark.config import load_config
    from litespark.parallel.rng import random_states
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.run import build_hooks
    from litespark.training.setup import set_up
    from litespark.training.step import train_step

    run = set_up(load_config(config_path, overrides))
    hooks = [hook for hook in build_hooks(run) if type(hook).__name__ != "Watchdog"]
    for hook in hooks:
        hook.on_start(run)
    for hook in hooks:
        hook.on_state(run)
    before = random_states()
    while run.step < stop_step:
        outcome = train_step(run)
        draw(rank)
        for hook in hooks:
            hook.after_step(run, outcome)
    after = random_states()
    saving = next(hook for hook in hooks if isinstance(hook, Checkpointing))
    saving.save_now(run)
    for hook in hooks:
        hook.close()
    run.close()
    return before, after


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_every_rank_goes_on_with_its_own_random_numbers_and_draws_no_more(
    layout, config_path, tmp_path
):
    def states(folder: str, stop_step: int) -> list[tuple[Any, Any]]:
        options = [layout, f"run.output_dir={tmp_path / folder}"]
        return run_distributed(random_states_rank, 2, config_path, options, stop_step)

    whole, first, second = states("whole", 4), states("parts", 2), states("parts", 4)
    assert first[0][1] != first[1][1], "the ranks drew differently"
    for rank in range(2):
        assert second[rank][0] == first[rank][1], "not its own state, or one draw off"
        assert second[rank][1] == whole[rank][1]
    assert set(whole[0][1]) == {"python", "numpy", "torch_cpu", "torch_device", "megatron"}


@pytest.fixture(scope="module")
def saved(config_path, tmp_path_factory):
    """A checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("saved")
    run_distributed(train_and_save_rank, 1, config_path, [f"run.output_dir={folder}"], 2)
    return folder / "checkpoints" / "step_000000002"


def save_without_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str], lost: str
) -> None:
    """Save as a framework would that forgets a part of the optimizer's state."""
    from litespark.checkpoint import sharded

    original = sharded.optimizer_tensors

    def some(*arguments: Any) -> Any:
        return [shard for shard in original(*arguments) if lost not in shard.key]

    sharded.optimizer_tensors = some
    train_and_save_rank(rank, world_size, config_path, overrides, 2)


def resume_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str]
) -> tuple[str, str]:
    """Resume; the error by its kind and its words."""
    from litespark.config import load_config
    from litespark.training.setup import set_up

    try:
        run = set_up(load_config(config_path, overrides))
    except BaseException as error:  # also what is no Exception
        return type(error).__name__, str(error)
    run.close()
    return "", ""


def save_as_a_gpu_rank(rank: int, world_size: int, config_path: str, overrides: list[str]) -> None:
    """Save with states of the device's generators as a GPU has them: a seed and an offset."""
    import base64

    from litespark.checkpoint import save

    original, of_gpu = save.random_states, base64.b64encode(bytes(16)).decode()

    def states() -> dict[str, Any]:
        found = original()
        return found | {
            "torch_device": of_gpu,
            "megatron": dict.fromkeys(found["megatron"], of_gpu),
        }

    save.random_states = states
    train_and_save_rank(rank, world_size, config_path, overrides, 2)


def resumed_random_states_rank(
    rank: int, world_size: int, config_path: str, overrides: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states after a resume, and those of a run that is seeded anew at its step."""
    from litespark.config import load_config
    from litespark.parallel.rng import random_states, seed_anew
    from litespark.training.setup import set_up

    run = set_up(load_config(config_path, overrides))
    found = random_states()
    seed_anew(run.config.seed, 2)
    run.close()
    return found, random_states()


def test_a_gpus_checkpoint_goes_on_on_a_cpu(config_path, tmp_path):
    """Their generators have nothing in common; everything else does."""
    options = [f"run.output_dir={tmp_path}"]
    run_distributed(save_as_a_gpu_rank, 1, config_path, options)
    found, anew = run_distributed(resumed_random_states_rank, 1, config_path, options)[0]
    assert found == anew


@pytest.mark.parametrize("lost", ["exp_avg.", "exp_avg_sq.", "exp_avg.output_layer"])
def test_moments_that_are_not_there_are_missed_by_name(lost, config_path, tmp_path):
    options = [f"run.output_dir={tmp_path}"]
    run_distributed(save_without_rank, 1, config_path, options, lost)
    kind, said = run_distributed(resume_rank, 1, config_path, options)[0]
    assert kind == "UserError"
    assert f"it lacks optimizer.{lost}" in said


def test_what_would_be_left_unread_is_refused_by_name(saved, config_path, tmp_path):
    """A model with tied embeddings has no place for an output layer."""
    options = [f"run.output_dir={tmp_path}", f"run.resume={saved}"]
    kind, said = run_distributed(resume_rank, 1, config_path, [*options, "seed=3"])[0]
    assert (kind, said) == ("", "")
    shutil.copytree(saved, tmp_path / "other" / saved.name)
    spoil_shape(tmp_path / "other" / saved.name)
    options = [
        f"run.output_dir={tmp_path / 'new'}",
        f"run.resume={tmp_path / 'other' / saved.name}",
    ]
    options += ["model.tie_embeddings=true", "checkpoint.verify=false"]
    kind, said = run_distributed(resume_rank, 1, config_path, options)[0]
    assert kind == "UserError"
    assert "also holds" in said
    assert "output_layer.weight" in said


def spoil_shape(checkpoint: Path) -> None:
    """Let run_state.json say that the model had tied embeddings; the size stays."""
    path = checkpoint / "run_state.json"
    text = path.read_text()
    path.write_text(text.replace('"tie_embeddings": false', '"tie_embeddings": true '))
    assert path.stat().st_size == len(text)


def test_an_exception_that_is_no_exception_is_one_message(saved, config_path, tmp_path):
    """torch's CheckpointException derives from BaseException: `except Exception` misses it."""
    from torch.distributed.checkpoint.api import CheckpointException

    assert not issubclass(CheckpointException, Exception)
    checkpoint = tmp_path / "spoilt" / saved.name
    shutil.copytree(saved, checkpoint)
    shard = max(checkpoint.glob("state/*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(bytes(shard.stat().st_size))
    options = [f"run.output_dir={tmp_path / 'new'}", f"run.resume={checkpoint}"]
    kind, said = run_distributed(
        resume_rank, 1, config_path, [*options, "checkpoint.verify=false"]
    )[0]
    assert kind == "UserError"
    assert "cannot be loaded into this model" in said
    kind, said = run_distributed(resume_rank, 1, config_path, options)[0]
    assert (kind, shard.name in said) == ("DamagedCheckpoint", True)


def places_rank(rank: int, world_size: int, checkpoint: Path) -> list[str]:
    """Read a checkpoint whose index points outside, by training's way and by the export's."""
    from litespark.checkpoint.hf.families.llama import LLAMA
    from litespark.checkpoint.hf.read import CheckpointReader
    from litespark.checkpoint.run_state import RunState
    from litespark.checkpoint.sharded import check_readable
    from litespark.errors import UserError
    from megatron_patches import apply_patches

    apply_patches("cpu", only=["safe_checkpoint_metadata"])
    model = RunState.read(checkpoint).model_config()
    said = []
    for read in (check_readable, lambda path: CheckpointReader(path, LLAMA, model)):
        try:
            read(checkpoint)
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("outside", ["../../../secret", "/etc/passwd"])
def test_an_index_cannot_point_outside(outside, saved, tmp_path):
    import pickle
    from dataclasses import replace

    checkpoint = tmp_path / "hostile" / saved.name
    shutil.copytree(saved, checkpoint)
    index = checkpoint / "state" / ".metadata"
    metadata = pickle.loads(index.read_bytes())  # noqa: S301 - of our own making
    places = metadata.storage_data
    first = next(iter(places))
    places[first] = replace(places[first], relative_path=outside)
    index.write_bytes(pickle.dumps(metadata))
    said = run_distributed(places_rank, 1, checkpoint)[0]
    assert len(said) == 2, "one way reads it"
    assert all("lies outside" in line and outside in line for line in said)
