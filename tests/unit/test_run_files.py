"""What a run writes beside its tensors: metrics, checkpoint names, sinks."""

from __future__ import annotations

import json
import sys
import types

import pytest

from litespark.checkpoint.folder import (
    complete_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    publish_checkpoint,
    remove_leftovers,
    set_aside_later,
)
from litespark.checkpoint.run_state import FILE_NAME, RunState
from litespark.config.schema import RunConfig
from litespark.errors import MissingExtraError, UserError
from litespark.parallel.layout import RankLayout
from litespark.training.hooks.console import duration, energy, step_line
from litespark.training.hooks.metrics import drop_lines_after
from litespark.training.hooks.sinks import MlflowSink, PrometheusSink, WandbSink
from litespark.training.preflight import preflight
from tools.free_port import free_port

CONFIG = RunConfig.model_validate(
    {
        "run": {"output_dir": "out"},
        "model": {"preset": "tiny"},
        "data": {"blend": [{"prefix": "x"}], "sequence_length": 8},
        "batch": {"global": 1},
        "optimizer": {"lr": 1.0},
        "training": {"steps": 10},
    }
)


def make_checkpoint(checkpoints, step):
    temporary = checkpoints / f".step_{step:09d}.writing"
    temporary.mkdir(parents=True)
    state = RunState.of(CONFIG, RankLayout(1, 1, 1, 1), step=step, consumed_samples=step)
    (temporary / FILE_NAME).write_text(state.to_json())
    return publish_checkpoint(temporary, checkpoints, step)


def test_newest_of_complete_checkpoints(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    assert newest_checkpoint(checkpoints) is None
    for step in (5, 100, 20):
        make_checkpoint(checkpoints, step)
    (checkpoints / ".step_000000200.writing").mkdir()
    (checkpoints / "step_300").mkdir()  # not a name of ours
    assert [path.name for path in complete_checkpoints(checkpoints)] == [
        "step_000000005",
        "step_000000020",
        "step_000000100",
    ]
    newest = checkpoints / "step_000000020"
    assert newest_checkpoint(checkpoints) == newest, "`latest` says which, not the highest number"
    for named in (tmp_path, checkpoints, newest):
        assert find_checkpoint(named) == newest
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


def test_without_latest_the_last_step_is_the_newest(tmp_path):
    for step in (5, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "latest").write_text("step_000000999\n")
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000000100"
    (tmp_path / "latest").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000000100"


def test_a_roll_back_sets_later_checkpoints_aside(tmp_path):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step)
    moved = set_aside_later(tmp_path, 2)
    assert [path.name for path in moved] == [
        "rolled_back_step_000000004",
        "rolled_back_step_000000006",
    ]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000000002"
    make_checkpoint(tmp_path, 4)
    prune_checkpoints(tmp_path, keep_last=1)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000000004"


def test_a_kill_while_a_step_is_replaced_loses_nothing(tmp_path):
    make_checkpoint(tmp_path, 7)
    (tmp_path / "step_000000007").rename(tmp_path / ".step_000000007.replaced")
    remove_leftovers(tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000000007"


def test_publishing_a_step_again_replaces_it(tmp_path):
    make_checkpoint(tmp_path, 7)
    (tmp_path / "step_000000007" / "old").touch()
    make_checkpoint(tmp_path, 7)
    assert not (tmp_path / "step_000000007" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000000007"]


def test_pruning_and_leftovers(tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    (tmp_path / ".step_000000005.writing").mkdir()
    prune_checkpoints(tmp_path, keep_last=2)
    remove_leftovers(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_000000003", "step_000000004"]


def test_run_state_survives_and_refuses_other_versions(tmp_path):
    folder = make_checkpoint(tmp_path, 3)
    state = RunState.read(folder)
    assert (state.step, state.tokens, state.model_config()) == (3, 24, CONFIG.model)
    values = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(UserError, match="format_version = 99"):
        RunState.read(folder)
    (folder / FILE_NAME).write_text(json.dumps(values | {"model": None}))
    with pytest.raises(UserError, match="is not what was written"):
        RunState.read(folder)
    (folder / FILE_NAME).write_text("{")
    with pytest.raises(UserError, match=r"run_state\.json: cannot be read"):
        RunState.read(folder)


def test_metrics_of_later_steps_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1}, {"step": 2}, {"step": 2, "validation_loss": 1.0}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    drop_lines_after(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]
    drop_lines_after(tmp_path / "missing.jsonl", 2)
    assert not (tmp_path / "missing.jsonl").exists()


def test_step_line_shows_what_was_measured():
    record = {
        "step": 5,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "step_seconds": 0.25,
        "tokens_per_second": 4096.0,
        "tflops_per_gpu_causal": None,
        "mfu": None,
        "power_watts": None,
        "joules_per_token": None,
    }
    line = step_line(record, 10, 1024)
    assert line.startswith("step 5/10 | loss 2.5000 | lr 1.00e-03")
    assert line.endswith("4,096 tokens/s | 1 s left")
    on_gpu = {"tflops_per_gpu_causal": 400.0, "mfu": 0.404, "power_watts": 5512.0}
    on_gpu["joules_per_token"] = 0.0125
    gpu = step_line(record | on_gpu, 1_000_005, 1024)
    assert "400 TFLOP/s per GPU (causal) | MFU 40.4 % | 5,512 W | 12.5 J/1000 tokens" in gpu
    # 250,000 s; 1.024e9 tokens at 0.0125 J.
    assert gpu.endswith("2 d 21 h left | 3.56 kWh to the end")
    last = step_line(record | on_gpu, 5, 1024)
    assert "left" not in last


def test_times_and_energies_as_a_person_reads_them():
    assert [duration(s) for s in (5, 300, 12_000, 172_800)] == [
        "5 s",
        "5 min",
        "3 h 20 min",
        "2 d 0 h",
    ]
    assert [energy(j) for j in (900, 3.6e6, 3.6e12)] == ["900 J", "1 kWh", "1,000 MWh"]


def test_mlflow_gets_the_same_names_and_resumes_the_same_run(tmp_path, monkeypatch):
    calls = []
    mlflow = types.ModuleType("mlflow")
    info = types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
    mlflow.set_experiment = lambda name: calls.append(name)
    mlflow.start_run = lambda run_id, run_name: calls.append((run_id, run_name)) or info
    mlflow.log_dict = lambda config, name: calls.append(name)
    mlflow.log_metrics = lambda values, step: calls.append((values, step))
    mlflow.end_run = lambda: calls.append("ended")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for _ in range(2):
        sink = MlflowSink("experiment", CONFIG, tmp_path)
        sink.write({"step": 3, "loss": 1.5, "mfu": None})
        sink.close()
    logged = ({"step": 3.0, "loss": 1.5}, 3)
    assert calls[:5] == ["experiment", (None, "run"), "config.yaml", logged, "ended"]
    assert calls[5:] == ["experiment", ("abc", "run"), logged, "ended"]


def test_prometheus_serves_the_newest_line():
    pytest.importorskip("prometheus_client")
    import urllib.request

    port = free_port()
    sink = PrometheusSink(port, "127.0.0.1", CONFIG)

    def page() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    try:
        sink.write({"step": 3, "loss": 1.5, "mfu": 0.5})
        assert 'litespark_loss{run="run"} 1.5' in page()
        sink.write({"step": 4, "loss": 1.25, "mfu": None})
        assert 'litespark_loss{run="run"} 1.25' in page()
        assert "litespark_mfu{" not in page(), "an old value is not the present one"
        with pytest.raises(UserError, match="cannot be listened on"):
            PrometheusSink(port, "127.0.0.1", CONFIG)
    finally:
        sink.close()


def test_wandb_gets_the_records_and_resumes_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finished")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **arguments: calls.append(arguments) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        sink = WandbSink("project", CONFIG, tmp_path)
        sink.write({"step": 3, "loss": 1.5, "mfu": None})
        sink.close()
    first, logged, finished, second = calls[:4]
    assert first["project"] == "project"
    assert first["config"]["batch"] == {"micro": 1, "global": 1}
    assert (logged, finished) == (({"step": 3, "loss": 1.5}, 3), "finished")
    assert second["id"] == first["id"], "a resumed run goes on where it was"


def test_wandb_that_is_not_installed_is_found_before_the_start(monkeypatch):
    monkeypatch.setattr("litespark.training.preflight.find_spec", lambda name: None)
    logging = CONFIG.logging.model_copy(update={"wandb_project": "p"})
    with pytest.raises(MissingExtraError, match=r"pip install 'litespark\[wandb\]'"):
        preflight(CONFIG.model_copy(update={"logging": logging}), 1)
