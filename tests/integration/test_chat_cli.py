"""The commands of post-training, as a user types them."""

from __future__ import annotations

import json

import yaml

from tests.support.chats import chat_config, pairs, train_chat_tokenizer, write_rows
from tests.support.cli import run as litespark


def test_preference_pairs_from_rows_to_metrics(tmp_path):
    tokenizer = train_chat_tokenizer(tmp_path / "tokenizer")
    rows = [*pairs(30), {"prompt": "q", "chosen": "a", "rejected": "a"}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    command = ["preprocess", "--task", "dpo", "--input", str(source), "--workers", "1"]
    command += ["--tokenizer", str(tokenizer), "--output-prefix", str(tmp_path / "chats")]
    stopped = litespark(*command)
    assert stopped.returncode == 2
    assert f"{source}:31: chosen equals rejected" in stopped.stderr
    done = litespark(*command, "--on-error", "skip", "--max-length", "200")
    assert done.returncode == 0, done.stderr
    assert "1 chosen equals rejected" in done.stdout
    assert "30 of 31 rows" in done.stdout
    assert litespark("data", "verify", str(tmp_path / "chats_dpo_document")).returncode == 0

    tree = chat_config(tmp_path, "dpo", str(tmp_path / "chats_dpo_document"))
    tree["training"] = {"steps": 3, "eval_every": 3, "eval_steps": 1}
    tree["data"]["tokenizer"] = str(tokenizer)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    trained = litespark("train", str(tmp_path / "run.yaml"))
    assert trained.returncode == 0, trained.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, *_, validation = [json.loads(line) for line in lines]
    assert abs(first["loss"] - 0.693147) < 1e-4, "the policy begins as the reference"
    assert abs(first["reward_margin"]) < 1e-3
    names = {"reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "kl_estimate"}
    assert names <= first.keys()
    assert {f"validation_{name}" for name in names} <= validation.keys()
    assert "accuracy" in trained.stdout

    again = litespark("train", str(tmp_path / "run.yaml"), "task=sft")
    assert again.returncode == 2
    assert "--task dpo" in again.stderr


def test_options_of_the_other_task_are_refused(tmp_path):
    common = ["preprocess", "--input", "x.jsonl", "--tokenizer", "t", "--output-prefix", "p"]
    for options in (["--turns", "last"], ["--task", "sft", "--json-key", "body"]):
        refused = litespark(*common, *options)
        assert refused.returncode == 2
        assert "has no effect" in refused.stderr
