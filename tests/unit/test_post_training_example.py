"""The made-up chats of `examples/post_training`: what makes its figures mean something."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "post_training"


@pytest.fixture
def chats(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import make_chats

    return make_chats


def turns(rows):
    for row in rows:
        messages = [message["content"] for message in row["messages"]]
        yield from zip(messages[::2], messages[1::2], strict=True)


def test_each_form_is_chosen_in_half_of_the_pairs_held_out(chats):
    cases = chats.held_out()
    assert len(cases) >= 100
    forms = Counter(case.chosen[-1] for case in cases)
    assert set(forms.values()) == {len(cases) // 2}


def test_conversations_give_each_form_to_each_question_alike(chats):
    known = len(chats.cases()) - len(chats.held_out())
    rows = chats.conversations(1500)
    seen = Counter(turns(rows))
    assert len(seen) == 2 * known  # each question with both answers
    assert max(seen.values()) - min(seen.values()) <= 1
    assert rows == chats.conversations(1500)


def test_what_is_held_out_is_in_no_training(chats):
    held_out = {case.question for case in chats.held_out()}
    assert not held_out & {question for question, _ in turns(chats.conversations(1500))}
    pairs = chats.preferences()
    config = yaml.safe_load((EXAMPLE / "dpo.yaml").read_text())
    train, valid, _ = config["data"]["split"]
    start = len(pairs) * train // (train + valid)
    assert {pair["prompt"] for pair in pairs[start:]} == held_out
    assert not {pair["prompt"] for pair in pairs[:start]} & held_out


def test_files_are_the_same_each_time(chats, tmp_path, monkeypatch):
    written = []
    for name in ("first", "second"):
        monkeypatch.setattr("sys.argv", ["make_chats.py", "--output", str(tmp_path / name)])
        assert chats.main() == 0
        written.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())})
    assert written[0] == written[1]
    assert list(written[0]) == ["conversations.jsonl", "preferences.jsonl"]
    assert json.loads(written[0]["preferences.jsonl"].splitlines()[0]).keys() == {
        "prompt",
        "chosen",
        "rejected",
    }
