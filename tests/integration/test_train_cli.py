"""`litespark train` as a user runs it: real processes, real kills, real mistakes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support import cli
from tests.support.runs import config_tree, write_shard

pytestmark = pytest.mark.distributed

# In the design's order; a value that cannot be measured is null, but the key is there.
METRICS = [
    *("step", "tokens", "loss", "lr", "grad_norm", "step_seconds", "tokens_per_second"),
    *("tokens_per_second_per_gpu", "tflops_per_gpu_causal", "tflops_per_gpu_full", "mfu"),
    *("energy_joules", "evaluation_joules", "checkpoint_joules", "idle_joules", "host_joules"),
    *("joules_per_token", "power_watts", "memory_bytes"),
    *("data_wait_seconds", "checkpoint_seconds"),
]


@pytest.fixture
def config(tmp_path) -> Path:
    shard = write_shard(tmp_path / "tokens")
    tree = config_tree(tmp_path, shard)
    tree["training"].update(steps=12, save_every=4, eval_every=6, eval_steps=2)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(run_dir) if "loss" in r}


def test_a_run_writes_what_it_says(config, tmp_path):
    done = cli.run("train", str(config), "logging.tensorboard=true")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "run"
    lines = records(run_dir)
    assert list(lines[0]) == METRICS
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
    assert lines[-2]["tokens"] == 12 * 8 * 32
    assert lines[0]["mfu"] is None, "a CPU has no MFU"
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["latest", "step_000000004", "step_000000008", "step_000000012"]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_000000012\n"
    assert list((run_dir / "tensorboard").glob("events.out.tfevents*"))
    # Doing it again does nothing: the run is finished.
    assert cli.run("train", str(config)).returncode == 0
    assert records(run_dir) == lines


def test_killed_at_a_random_moment_it_ends_with_the_same_bits(config, tmp_path):
    """kill -9 of the launcher, which takes its ranks along; then the same command again."""
    options = ["--nproc", "2", "parallel.tensor=2", "training.steps=30", "training.log_every=1"]
    whole = [f"run.output_dir={tmp_path / 'whole'}", *options]
    cut = [f"run.output_dir={tmp_path / 'cut'}", *options]
    assert cli.run("train", str(config), *whole).returncode == 0

    first = cli.start("train", str(config), *cut)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 9)
    # The save of step 8 has waited for that of step 4, which is there to go on from.
    time.sleep(random.uniform(0, 0.5))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_until(lambda: not ranks_alive(str(tmp_path / "cut")))
    assert max(losses(tmp_path / "cut")) < 30, "killed too late to show anything"

    resumed = cli.run("train", str(config), *cut)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step" in resumed.stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    last = Path("checkpoints") / "step_000000030" / "state"
    assert shards(tmp_path / "cut" / last) == shards(tmp_path / "whole" / last)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_with_3(number, config, tmp_path):
    options = ["--nproc", "2", "parallel.pipeline=2", "training.steps=4000", "training.log_every=1"]
    run = cli.start("train", str(config), *options, "training.save_every=null")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    run.send_signal(number)
    _, err = run.communicate(timeout=cli.PATIENCE_SECONDS)
    assert run.returncode == 3, err
    assert err.count("the state is saved") == 1, "one rank speaks for all"
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step_"))
    assert f"after step {step}" in err
    more = cli.run("train", str(config), *options, f"training.steps={step + 2}")
    assert more.returncode == 0, more.stderr
    assert max(losses(tmp_path / "run")) == step + 2


def test_a_signal_before_there_is_a_state_is_not_called_saved(config, tmp_path):
    run = cli.start("train", str(config), "--nproc", "2")
    wait_until(lambda: count_ranks(str(config)) >= 3)  # the launcher and its two ranks
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=cli.PATIENCE_SECONDS)
    assert run.returncode == 128 + signal.SIGTERM, err
    assert "before a state was saved" in err


def test_two_runs_in_one_folder(config, tmp_path):
    first = cli.start("train", str(config), "training.steps=100000")
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    second = cli.run("train", str(config))
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"process {first.pid} on" in second.stderr


def test_dry_run_trains_nothing(config, tmp_path):
    shown = cli.run("train", str(config), "--nproc", "4", "--dry-run", "parallel.tensor=2")
    assert shown.returncode == 0, shown.stderr
    assert "4 processes: TP2 x CP1 x DP2 x PP1" in shown.stdout
    assert "12 steps of 256 tokens; starts anew" in shown.stdout
    resolved = shown.stdout[: shown.stdout.index("\n4 processes")]
    assert yaml.safe_load(resolved)["model"]["head_dim"] == 8
    assert not (tmp_path / "run").exists()


def test_under_torchrun_a_mistake_ends_all_ranks_with_one_message(config, tmp_path):
    """The way of many nodes: there is no launcher of ours to check first."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "litespark", "train", str(config)),
            f"data.blend=[{{prefix: {tmp_path / 'no'}}}]",
        ],
        capture_output=True,
        text=True,
        env=cli.environment(),
        cwd=cli.ROOT,
        timeout=cli.PATIENCE_SECONDS,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("litespark: error")]
    assert len(said) == 1
    assert str(tmp_path / "no") in said[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_a_gpu_an_installed_transformer_engine_is_left_alone(config, tmp_path):
    """A login node has the cluster's environment and no GPU: its packages import, and then fail."""
    for package in ("transformer_engine", "apex"):
        folder = tmp_path / "site" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('imported without a GPU')\n")
    done = subprocess.run(
        [sys.executable, "-m", "litespark", "train", str(config), "training.steps=2"],
        capture_output=True,
        text=True,
        env=cli.environment()
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tmp_path / 'site'}:{cli.ROOT}"},
        cwd=cli.ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert max(losses(tmp_path / "run")) == 2


MISTAKES = {
    "misspelt key": (["parallel.tensr=2"], ["parallel.tensr", "Did you mean 'tensor'"]),
    "wrong type": (["batch.micro=two"], ["batch.micro = 'two'", "valid integer"]),
    "degrees and processes": (["parallel.tensor=3"], ["3 x 1 x 1 = 3", "processes, 2"]),
    "heads and TP": (
        ["parallel.tensor=2", "model.num_attention_heads=9", "model.num_query_groups=3"],
        ["model.num_attention_heads = 9", "parallel.tensor = 2"],
    ),
    "sequence, TP and CP": (
        ["parallel.context=2", "data.sequence_length=30"],
        ["data.sequence_length = 30", "multiple of 4"],
    ),
    "missing data": (["data.blend=[{prefix: nowhere/text_document}]"], ["nowhere/text_document"]),
    "missing checkpoint": (["run.resume=nowhere"], ["nowhere", "no complete checkpoint"]),
    "folder that cannot be": (["run.output_dir=/proc/run"], ["run.output_dir = /proc/run"]),
    "nproc": (["--nproc", "0"], ["--nproc 0"]),
    "override without value": (["seed"], ["override 'seed'", "no '='"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_message_and_exit_code_2(name, config, tmp_path):
    overrides, words = MISTAKES[name]
    started = time.monotonic()
    ended = cli.run("train", str(config), "--nproc", "2", *overrides, timeout_seconds=30)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("litespark: error: ")
    assert ended.stderr.count("litespark: error: ") == 1
    assert "Traceback" not in ended.stderr
    for word in words:
        assert word in ended.stderr
    assert not (tmp_path / "run").exists(), "nothing half-written"
    print(f"{name}: {time.monotonic() - started:.1f} s")


def test_vocabulary_smaller_than_the_tokenizers(config, tmp_path):
    from tests.support.data import train_json_tokenizer

    tokenizer = train_json_tokenizer(tmp_path / "tokenizer")
    ended = cli.run("train", str(config), f"data.tokenizer={tokenizer}")
    assert ended.returncode == 2
    assert "model.vocab_size = 120: is smaller than that of the tokenizer" in ended.stderr
    assert "Set model.vocab_size=600" in ended.stderr


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_index(damage, config, tmp_path):
    index = tmp_path / "tokens.idx"
    content = index.read_bytes()
    index.write_bytes(content[:-20] if damage == "truncated" else b"PK\x03\x04" + content[4:])
    ended = cli.run("train", str(config), "--nproc", "2")
    assert ended.returncode == 2
    assert "tokens.idx" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_disk_full_at_the_last_save_ends_with_1_and_leaves_nothing(config, tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails in the same place."""
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 200; exec {sys.executable} -m litespark train {config}"],
        capture_output=True,
        text=True,
        env=cli.environment(),
        cwd=cli.ROOT,
    )
    assert done.returncode == 1
    assert "step 12 could not be saved" in done.stderr.strip().splitlines()[-1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_checkpoint_of_another_shape(config, tmp_path):
    short = ["training.steps=2", "training.eval_every=null"]
    assert cli.run("train", str(config), *short).returncode == 0
    before = sorted((tmp_path / "run").rglob("*"))
    ended = cli.run("train", str(config), "model.num_layers=2", "model.ffn_hidden_size=64", *short)
    assert ended.returncode == 2
    assert "model.num_layers = 2: the checkpoint" in ended.stderr
    assert "was written with 4" in ended.stderr
    assert "model.ffn_hidden_size = 64" in ended.stderr
    assert sorted((tmp_path / "run").rglob("*")) == before
    ended = cli.run("train", str(config), "run.resume=never", *short)
    assert ended.returncode == 2
    assert "already holds step_000000002" in ended.stderr


def ranks_alive(mark: str) -> bool:
    """Whether a process whose command line holds `mark` still runs."""
    return count_ranks(mark) > 0


def count_ranks(mark: str) -> int:
    """How many processes have `mark` in their command line."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += mark.encode() in path.read_bytes()
        except OSError:
            continue
    return found


def shards(folder: Path) -> dict[str, bytes]:
    """The tensor files of a checkpoint, byte for byte."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.distcp")}
    assert found
    return found


def wait_until(condition, timeout_seconds: float = cli.PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
