"""Bad steps are not applied, are written down, and end a run or send it back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.support import cli
from tests.support.runs import config_tree, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "alone": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2": (2, []),
    "dp2, each all of the optimizer": (2, ["parallel.distributed_optimizer=false"]),
}
BATCH = 8


@pytest.fixture
def config_path(tmp_path) -> str:
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["schedule"] = {"kind": "constant"}  # the rate does not tell one step from another
    tree["training"].update(steps=12, save_every=4)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def poisoned_rank(rank, world_size, config_path, overrides, factors, skipped=None):
    """Train with all hooks; the n-th forward and backward of the run, counted from 1, has its loss
    multiplied by `factors[n]`.  With `skipped`, the samples of those steps are left out instead.

    Returns each step's loss and norm, the weights and optimizer state, and the error that ended
    the run."""
    from litespark.checkpoint.sharded import bare_model
    from litespark.config import load_config
    from litespark.errors import GuardError
    from litespark.training.loop import Hook, train
    from litespark.training.run import build_hooks
    from litespark.training.setup import batch_loader, set_up
    from litespark.training.step import mean_loss

    run = set_up(load_config(config_path, overrides))
    clean, history, seen = run.forward_step, [], []

    def forward_step(batches, model):
        output, loss_function = clean(batches, model)
        attempt = len(seen) + 1

        def poisoned(output):
            loss, tokens, report = loss_function(output)
            factor = factors.get(attempt, 1.0)
            scale = torch.tensor([factor, 1.0])  # the number of tokens stays
            return loss * factor, tokens, {key: value * scale for key, value in report.items()}

        return output, poisoned

    class Recorder(Hook):
        def after_step(self, run, outcome):
            history.append((run.step, mean_loss(outcome.loss_and_tokens), outcome.grad_norm))

    class Counter(Hook):
        def after_step(self, run, outcome):
            seen.append(run.step)
            if skipped and run.step == skipped[0]:
                run.consumed_samples += BATCH * skipped[1]
                if run.train_batches is not None:
                    samples = run.train_batches.samples
                    run.train_batches.close()
                    run.train_batches = batch_loader(run, samples)

    run.forward_step = forward_step
    error = None
    try:
        train(run, [Counter(), *build_hooks(run), Recorder()])
    except GuardError as found:
        error = str(found)
    run.close()
    weights = [p.detach().clone() for c in run.chunks for p in bare_model(c).parameters()]
    moments = [
        value.clone()
        for each in run.optimizer.chained_optimizers
        for state in each.optimizer.state.values()
        for key, value in sorted(state.items())
        if torch.is_tensor(value)
    ]
    return {
        "history": history,
        "weights": weights,
        "moments": moments,
        "error": error,
        "consumed": run.consumed_samples,
    }


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def events(folder: Path, name: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.parametrize(
    ("layout", "factor"), [*((name, math.nan) for name in LAYOUTS), ("alone", math.inf)]
)
def test_a_bad_step_leaves_no_trace_in_the_weights(layout, factor, config_path, tmp_path):
    """Weights, moments and the count of steps are those of a run that never saw the batch."""
    processes, overrides = LAYOUTS[layout]
    found = run_distributed(poisoned_rank, processes, config_path, overrides, {5: factor})
    clean = run_distributed(
        poisoned_rank,
        processes,
        config_path,
        [*overrides, f"run.output_dir={tmp_path / 'clean'}", "training.steps=11"],
        {},
        (4, 1),
    )
    for one, other in zip(found, clean, strict=True):
        assert one["error"] is None
        assert one["consumed"] == other["consumed"] == 12 * BATCH
        assert same(one["weights"], other["weights"])
        assert same(one["moments"], other["moments"])
        good = [entry[1:] for entry in one["history"] if entry[0] != 5]
        assert good == [entry[1:] for entry in other["history"]]
    (event,) = events(tmp_path / "run", "bad_step")
    assert event["step"] == 5
    assert "gradient norm" in event["detail"]


def test_the_batch_is_written(config_path, tmp_path):
    """All that the step was given, by the one rank of each replica that had it."""
    run_distributed(poisoned_rank, 4, config_path, ["parallel.tensor=2"], {5: math.nan})
    files = sorted((tmp_path / "run" / "bad_steps").iterdir())
    assert [file.name for file in files] == [
        f"step_000000005_data_{rank}.safetensors" for rank in (0, 1)
    ]
    from litespark.config import load_config
    from litespark.training.preflight import preflight

    samples = preflight(load_config(config_path, []), 1).train
    for rank, file in enumerate(files):
        with safe_open(file, "pt") as content:
            assert content.metadata()["first_sample_of_the_step"] == str(4 * BATCH)
            assert "norm" in content.metadata()["reason"]
            tokens_mbs = content.get_tensor("tokens_bs")
        assert tokens_mbs.shape == (2, 2, 32)
        for micro_batch in range(2):
            for row in range(2):
                sample = samples[4 * BATCH + (micro_batch * 2 + rank) * 2 + row]
                assert tokens_mbs[micro_batch, row].tolist() == sample[:-1].tolist()


def test_a_loss_spike_is_a_bad_step(config_path, tmp_path):
    options = ["resilience.spike_factor=2", "resilience.spike_window=3"]
    early, late = {2: 3.0}, {7: 3.0}
    (found,) = run_distributed(poisoned_rank, 1, config_path, options, late)
    assert [event["step"] for event in events(tmp_path / "run", "bad_step")] == [7]
    assert "more than 2 times the mean of the last 3" in str(events(tmp_path / "run", "bad_step"))
    assert found["error"] is None
    # Without a mean to hold it against, and without the option, it passes.
    for name, overrides, factors in (("early", options, early), ("off", [], late)):
        folder = tmp_path / name
        run_distributed(
            poisoned_rank, 1, config_path, [*overrides, f"run.output_dir={folder}"], factors
        )
        assert events(folder, "bad_step") == []


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_a_run_goes_back_and_on_with_other_data(layout, config_path, tmp_path):
    """From step 8 on it is a run that was resumed from step 4 and leaves out the samples of the
    bad steps and those before them."""
    processes, overrides = LAYOUTS[layout]
    options = [*overrides, "resilience.after_bad_steps=roll_back", "training.log_every=1"]
    poison = {6: math.nan, 7: math.nan, 8: math.nan}
    found = run_distributed(poisoned_rank, processes, config_path, options, poison)
    clean = run_distributed(
        poisoned_rank,
        processes,
        config_path,
        [*overrides, f"run.output_dir={tmp_path / 'clean'}"],
        {},
        (4, 4),
    )
    for one, other in zip(found, clean, strict=True):
        assert one["error"] is None
        assert one["consumed"] == other["consumed"] == (12 + 4) * BATCH
        assert same(one["weights"], other["weights"])
        assert one["history"][-8:] == other["history"][-8:]
    (event,) = events(tmp_path / "run", "rolled_back")
    assert "step_000000004" in event["detail"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13)), "each step once"


def test_it_does_not_go_back_for_ever(config_path):
    options = ["resilience.after_bad_steps=roll_back", "resilience.max_roll_backs=2"]
    poison = dict.fromkeys(range(5, 100), math.nan)
    (found,) = run_distributed(poisoned_rank, 1, config_path, options, poison)
    assert "after 2 roll-backs" in found["error"]
    assert len(found["history"]) == 4 + 3 * 3 - 3  # the recorder does not see the last of each


def test_there_may_be_nothing_to_go_back_to(config_path):
    options = ["resilience.after_bad_steps=roll_back", "training.save_every=null"]
    poison = dict.fromkeys(range(1, 100), math.nan)
    (found,) = run_distributed(poisoned_rank, 1, config_path, options, poison)
    assert "no checkpoint to go back to" in found["error"]


def test_a_run_whose_weights_are_ruined_ends_with_4(config_path, tmp_path):
    """For real: an absurd rate, and no clipping."""
    ended = cli.run(
        *("train", config_path, "--nproc", "2"), "optimizer.lr=1e30", "optimizer.clip_grad=0"
    )
    assert ended.returncode == 4, ended.stderr
    (last,) = [line for line in ended.stderr.splitlines() if "3 bad steps in a row" in line]
    assert last.startswith("litespark: error: ")
    assert "the gradient norm is" in last
    assert "optimizer.lr" in last
    saved = list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == [], "a state with NaN must not be saved"
    assert len(list((tmp_path / "run" / "bad_steps").iterdir())) == 3 * 2
