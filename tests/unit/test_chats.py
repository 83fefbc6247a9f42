"""Conversations: from rows to tokens and answers, exactly as transformers writes them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from litespark.data.chat_encoding import open_encoder
from litespark.data.chat_job import ChatOptions, preprocess_chats
from litespark.data.chat_samples import ChatCorpus
from litespark.data.chat_shards import ChatShard, answers_prefix
from litespark.data.chat_template import load_chat_template
from litespark.data.conversations import BadRow, conversation_of, preference_of
from litespark.data.index_file import bin_path
from litespark.data.manifest import read_manifest
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import UserError
from tests.support.chats import (
    CHATML,
    CHATML_MARKED,
    FORGETFUL,
    conversations,
    pairs,
    train_chat_tokenizer,
    write_chat_shard,
    write_rows,
)


def encoder(folder, template=CHATML):
    return from_folder(train_chat_tokenizer(folder, template))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    templates = {"chatml": CHATML, "marked": CHATML_MARKED, "forgetful": FORGETFUL}
    return {
        name: train_chat_tokenizer(folder / name, template) for name, template in templates.items()
    }


def from_folder(folder, turns="all"):
    return open_encoder(load_tokenizer(folder), turns=turns)


def mask_of(chat):
    mask = np.zeros(len(chat.ids), dtype=int)
    for start, stop in chat.answers:
        mask[start:stop] = 1
    return mask.tolist()


UNICODE = [
    {"role": "user", "content": "Grüße, 你好 👩‍👩‍👧 <s> {{ 1 }}\n\n  "},
    {"role": "assistant", "content": "  naïve façade 🤖\n\tx = 1  "},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "0"},
]


def test_tokens_and_answers_are_those_of_transformers(folders):
    """With marks transformers tells the answers itself; without, ours are the same."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders["marked"])
    ours = {name: from_folder(folders[name]) for name in ("chatml", "marked")}
    rows = [*conversations(40), {"messages": UNICODE}]
    for row in rows:
        expected = theirs.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        for found in (each.encode_conversation(conversation_of(row)) for each in ours.values()):
            assert found.ids == expected["input_ids"]
            assert mask_of(found) == expected["assistant_masks"]


def test_the_last_answer_alone(folders):
    row = {"messages": UNICODE}
    for name in ("chatml", "marked"):
        every = from_folder(folders[name]).encode_conversation(conversation_of(row))
        last = from_folder(folders[name], "last").encode_conversation(conversation_of(row))
        assert len(every.answers) == 2
        assert last.answers == every.answers[-1:]


def test_a_template_that_rewrites_earlier_turns(folders):
    thinking = "<think>hm</think>yes"
    row = {"messages": [m | {"content": thinking} for m in UNICODE]}
    with pytest.raises(BadRow) as error:
        from_folder(folders["forgetful"]).encode_conversation(conversation_of(row))
    assert error.value.reason == "template rewrites earlier turns"
    last = from_folder(folders["forgetful"], "last")
    found = last.encode_conversation(conversation_of(row))
    (span,) = found.answers
    text = load_tokenizer(folders["forgetful"]).decode(found.ids[slice(*span)])
    assert text == thinking


def test_a_prompt_is_that_of_transformers(folders):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders["chatml"])
    found = from_folder(folders["chatml"]).encode_prompt(UNICODE[:1])
    assert found == theirs.apply_chat_template(UNICODE[:1], add_generation_prompt=True)["input_ids"]


def test_pairs_share_their_prompt_and_differ_in_their_answers(folders):
    both = from_folder(folders["chatml"])
    tokenizer = load_tokenizer(folders["chatml"])
    for row in pairs(20):
        preference = preference_of(row)
        for chat, key in zip(
            both.encode_preference(preference), ("chosen", "rejected"), strict=True
        ):
            ((start, stop),) = chat.answers
            assert tokenizer.decode(chat.ids[start:stop]) == row[key]
            assert tokenizer.decode(chat.ids[:start]) == f"user\n{row['prompt']}\nassistant\n"


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"messages": UNICODE}, ["user", "assistant"] * 2),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            ["system", "user", "assistant"],
        ),
        ({"instruction": "i", "input": "x", "output": "a"}, ["user", "assistant"]),
        ({"instruction": "i", "input": "", "output": "a", "system": ""}, ["user", "assistant"]),
        ({"prompt": "q", "completion": "a"}, ["user", "assistant"]),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            ["user", "assistant"],
        ),
    ],
)
def test_layouts_of_rows(row, roles):
    messages = conversation_of(row).messages
    assert [message["role"] for message in messages] == roles
    assert all(isinstance(message["content"], str) for message in messages)


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD_CONVERSATIONS = [
    ([1], "not an object"),
    ({"text": "plain"}, "unknown layout"),
    ({"messages": []}, "not a list of messages"),
    ({"messages": "hello"}, "not a list of messages"),
    ({"messages": [USER, {"content": "a"}]}, "missing role"),
    ({"messages": [USER, {"role": None, "content": "a"}]}, "missing role"),
    ({"messages": [USER, {"role": "robot", "content": "a"}]}, "unknown role"),
    ({"messages": [USER, {"role": ["user"], "content": "a"}]}, "unknown role"),
    ({"messages": [USER, {"role": "assistant", "content": 7}]}, "not a string"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "not a string"),
    ({"messages": [USER, {"role": "assistant", "content": [{"image": "x"}]}]}, "not a string"),
    ({"messages": [USER]}, "no answer"),
    ({"messages": [USER, {"role": "assistant", "content": "  \n"}]}, "empty answer"),
    ({"messages": [{"role": "user", "content": "<|im_end|>"}, ANSWER]}, "control token in text"),
    ({"instruction": "i", "output": 3}, "not a string"),
    ({"messages": [USER, ANSWER], "tools": "x"}, "unknown layout"),
]
BAD_PAIRS = [
    ({"prompt": "q", "chosen": "a"}, "unknown layout"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "chosen equals rejected"),
    ({"chosen": [USER, ANSWER], "rejected": [ANSWER]}, "different prompts"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty answer"),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, "not a string"),
    ({"prompt": "q", "chosen": "a<|im_start|>", "rejected": "b"}, "control token in text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_CONVERSATIONS)
def test_bad_conversations(row, reason, folders):
    with pytest.raises(BadRow) as error:
        from_folder(folders["chatml"]).encode_conversation(conversation_of(row))
    assert error.value.reason == reason


@pytest.mark.parametrize(("row", "reason"), BAD_PAIRS)
def test_bad_pairs(row, reason, folders):
    with pytest.raises(BadRow) as error:
        from_folder(folders["chatml"]).encode_preference(preference_of(row))
    assert error.value.reason == reason


def options(folder, task, rows, **more):
    source = write_rows(folder / "rows.jsonl", rows)
    tokenizer = train_chat_tokenizer(folder / "tokenizer")
    return ChatOptions(task, (str(source),), str(tokenizer), str(folder / "out"), **more)


def test_every_row_is_accounted_for(tmp_path):
    rows = [*conversations(20), "{not json", *(row for row, _ in BAD_CONVERSATIONS)]
    chosen = options(tmp_path, "sft", rows, on_error="skip", max_tokens=60, over_long="drop")
    manifest, counts = preprocess_chats(chosen)
    assert counts.rows == len(rows) == counts.kept + sum(counts.left_out.values())
    expected = [reason for _, reason in BAD_CONVERSATIONS]
    for reason in set(expected):
        assert counts.left_out[reason] == expected.count(reason)
    assert counts.left_out["not JSON"] == 1
    assert 0 < counts.left_out["over-long"] < 20
    listed = chosen.quarantine_path.read_text().splitlines()
    assert len(listed) == sum(counts.left_out.values())
    assert f"{chosen.inputs[0]}:21: not JSON: " in listed[-len(BAD_CONVERSATIONS) - 1]
    assert manifest == read_manifest(chosen.shard_prefix)
    assert manifest.chats is not None
    assert manifest.chats.left_out == counts.left_out
    assert manifest.skipped_bad_lines == len(BAD_CONVERSATIONS) + 1
    assert manifest.files.documents == counts.kept == manifest.sources[0].documents


def test_a_bad_row_stops_the_job_with_its_place(tmp_path):
    rows = [*conversations(3), {"messages": [USER]}]
    chosen = options(tmp_path, "sft", rows)
    with pytest.raises(UserError, match=r"rows.jsonl:4.*no answer"):
        preprocess_chats(chosen)
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(UserError, match="number 2"):
        preprocess_chats(options(tmp_path, "sft", [*rows, rows[-1]], on_error="skip", max_errors=1))


def test_truncation_is_counted_and_never_leaves_a_prompt_alone(tmp_path):
    rows = conversations(30)
    whole, _ = preprocess_chats(options(tmp_path / "whole", "sft", rows))
    chosen = options(tmp_path / "cut", "sft", rows, max_tokens=50, over_long="truncate")
    _, counts = preprocess_chats(chosen)
    full, cut = (
        ChatShard(str(tmp_path / name / "out_sft_document"), "sft") for name in ("whole", "cut")
    )
    assert whole.files.documents == 30
    assert counts.truncated > 0
    assert counts.kept + counts.left_out["over-long"] == 30
    assert cut.lengths_tokens.max() == 50
    assert int((full.lengths_tokens > 50).sum()) == counts.truncated + counts.left_out["over-long"]
    assert all(len(cut.answers_of(n)) for n in range(cut.units))


def test_workers_change_nothing(tmp_path):
    rows = conversations(300)
    for workers in (1, 2):
        preprocess_chats(options(tmp_path / str(workers), "sft", rows, workers=workers))
    for name in ("out_sft_document", "out_sft_answers"):
        for suffix in (".bin", ".idx"):
            one, two = ((tmp_path / n / f"{name}{suffix}").read_bytes() for n in ("1", "2"))
            assert one == two


def test_samples_hold_whole_conversations_and_count_their_answers_alone(tmp_path):
    prefix = write_chat_shard(tmp_path, "sft", conversations(60))
    shard = ChatShard(prefix, "sft")
    corpus = ChatCorpus(shard, (0, 60), 256, seed=3)
    seen = []
    for index in range(corpus.samples_per_epoch):
        sample = corpus.read(index)
        starts = [0, *sample.document_ends[:-1].tolist()]
        mask = np.zeros(256)
        for start, end, document in zip(
            starts, sample.document_ends.tolist(), sample.documents.tolist(), strict=True
        ):
            assert np.array_equal(sample.tokens[start:end], shard.tokens.read(document))
            for first, stop in shard.answers_of(document).tolist():
                mask[start + first - 1 : start + stop - 1] = 1
        assert np.array_equal(sample.loss_mask(True), mask)
        assert sample.tokens_used == sample.document_ends[-1] <= 256
        seen += sample.documents.tolist()
    assert sorted(seen) == list(range(60))
    again = ChatCorpus(shard, (0, 60), 256, seed=3)
    far = 7 * corpus.samples_per_epoch + 2
    assert np.array_equal(again.read(far).tokens, corpus.read(far).tokens)
    with pytest.raises(UserError, match="is shorter than"):
        ChatCorpus(shard, (0, 60), 32, seed=3)


def test_the_halves_of_a_pair_stay_together(tmp_path):
    shard = ChatShard(write_chat_shard(tmp_path, "dpo", pairs(30)), "dpo")
    corpus = ChatCorpus(
        shard, (3, 30), 256, seed=0, reference_logps=np.arange(60, dtype=np.float32)
    )
    seen = []
    for index in range(corpus.samples_per_epoch):
        sample = corpus.read(index)
        assert (sample.documents[1::2] == sample.documents[::2] + 1).all()
        assert (sample.documents[::2] % 2 == 0).all()
        assert np.array_equal(sample.reference_logps, sample.documents)
        seen += sample.documents.tolist()
    assert sorted(seen) == list(range(6, 60))


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    prefix = write_chat_shard(tmp_path / "a", "sft", conversations(20))
    other = write_chat_shard(tmp_path / "b", "sft", conversations(20, seed=1))
    with pytest.raises(UserError, match="--task sft"):
        ChatShard(prefix, "dpo")
    for suffix in (".bin", ".idx"):
        shutil.copy(answers_prefix(other) + suffix, answers_prefix(prefix) + suffix)
    with pytest.raises(UserError, match="does not belong"):
        ChatShard(prefix, "sft")
    path = bin_path(answers_prefix(other))
    damaged = np.fromfile(path, dtype=np.int32)
    damaged[-1] = 10**6
    path.write_bytes(damaged.tobytes())
    with pytest.raises(UserError, match="does not belong"):
        ChatShard(other, "sft")


def test_templates_are_sandboxed_and_refuse_with_a_reason(tmp_path):
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    refusing = "{{ raise_exception('no system prompts') }}"
    for name, template, words in (
        ("hostile", hostile, "unsafe"),
        ("refusing", refusing, "no system prompts"),
        ("dated", "{{ strftime_now('%Y') }}", "undefined"),
    ):
        with pytest.raises(BadRow, match=words) as error:
            encoder(tmp_path / name, template).encode_conversation(
                conversation_of({"messages": [USER, ANSWER]})
            )
        assert error.value.reason == "template refused"
    with pytest.raises(UserError, match="Jinja"):
        encoder(tmp_path / "broken", "{% for %}")
    folder = train_chat_tokenizer(tmp_path / "none")
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="no chat template"):
        load_chat_template(folder / "tokenizer.json", ())
