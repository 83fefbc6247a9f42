"""Generated text: the cache changes nothing, the seed decides, padding never appears."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from litespark.cli import generate as command
from litespark.config.schema import RunConfig
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import UserError
from litespark.models.generate import Sampling, generate, probabilities
from litespark.training.single import single_process
from tests.integration.tiny import build, tiny_values, write_checkpoint, write_tokenizer
from tests.support.spawn import run_distributed

GREEDY = Sampling(temperature=0.0)
PROMPT = [5, 99, 3, 17, 42]
LLAMA3_ROPE = {"factor": 8.0, "original_max_sequence_length": 16}


def continuation(model, sampling=GREEDY, *, count=32, eos_id=None, prompt=PROMPT):
    return generate(model, prompt, max_new_tokens=count, sampling=sampling, eos_id=eos_id)


def recomputed(model, count):
    """Greedy text with the whole sequence computed anew for each token."""
    ids = list(PROMPT)
    for _ in range(count):
        with torch.no_grad():
            logits_bsv = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        ids.append(int(model.mask_padding(logits_bsv)[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_query_groups": 1, "head_dim": 24},
        {"rope_scaling": LLAMA3_ROPE, "tie_embeddings": True},
        {"vocab_size": 101, "vocab_padding_multiple": 64},
    ],
    ids=["gqa", "mqa_head_dim", "llama3_rope_tied", "padded"],
)
def test_cache_gives_the_text_of_recomputing(make_model, shape):
    model = make_model(**shape)
    with_cache = continuation(model)
    assert with_cache == recomputed(model, 32)
    assert len(set(with_cache)) > 3, "a text of one token would prove nothing"


def test_seed_decides(make_model):
    model = make_model()
    first = continuation(model, Sampling(temperature=1.0, seed=1))
    torch.randn(10)  # the global generator has no say
    assert continuation(model, Sampling(temperature=1.0, seed=1)) == first
    assert continuation(model, Sampling(temperature=1.0, seed=2)) != first


def test_padding_is_never_chosen(make_model):
    model = make_model(vocab_size=101, vocab_padding_multiple=64)
    with torch.no_grad():  # padding that would win every time
        model.output_layer.weight[101:] *= 1000
        logits_bsv = model(torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None], None)
    assert logits_bsv[0, -1].argmax() >= 101
    for sampling in (GREEDY, Sampling(temperature=50.0), Sampling(temperature=50.0, top_k=120)):
        assert max(continuation(model, sampling, count=50)) < 101


def test_stops_at_the_end_of_text(make_model):
    model = make_model()
    whole = continuation(model)
    eos_id = whole[9]
    assert continuation(model, eos_id=eos_id) == whole[: whole.index(eos_id)]


def test_the_longest_sequence_can_be_filled(make_model):
    model = make_model()
    room = 64 - len(PROMPT)
    assert len(continuation(model, count=room)) == room
    with pytest.raises(UserError, match=f"longest sequence, 64 tokens. Give at most {room}"):
        continuation(model, count=room + 1)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 4, "prompt: is empty"),
        ([1] * 64, 4, "prompt of 64 tokens: leaves no room"),
        ([1, 128], 4, "token 128 in the prompt: is not in the model's vocabulary of 128"),
        ([1, -1], 4, "token -1 in the prompt"),
        ([1], 0, "max-new-tokens 0: is too small"),
    ],
)
def test_refuses_a_prompt_that_cannot_be_continued(make_model, prompt, count, message):
    with pytest.raises(UserError, match=message):
        continuation(make_model(), count=count, prompt=prompt)


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 2}],
)
def test_refuses_sampling_out_of_range(values):
    with pytest.raises(UserError, match="Give"):
        Sampling(**values)


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.2, 0.3, 0]),
        (Sampling(0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30, 0]),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_k=99), [0.1, 0.4, 0.2, 0.3, 0]),
        (Sampling(1.0, top_p=0.65), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9, 0]),
        (Sampling(1.0, top_p=1e-9), [0, 1, 0, 0, 0]),
        # top-p counts what top-k has left: 4/7 alone reaches 0.55.
        (Sampling(1.0, top_k=2, top_p=0.55), [0, 1, 0, 0, 0]),
        (Sampling(1e-300), [0, 1, 0, 0, 0]),
    ],
)
def test_probabilities_in_closed_form(sampling, expected):
    found = probabilities(LOGITS, sampling)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.distributed
def test_command(tmp_path, capsys):
    """The prompt and its continuation, of a checkpoint written at another layout."""
    folder = write_tokenizer(tmp_path / "tokenizer").parent
    values = tiny_values(str(tmp_path / "run"), vocab_size=301, vocab_padding_multiple=8)
    values["parallel"] = {"tensor": 2}
    run_distributed(write_checkpoint, 2, values)
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())

    def text(*arguments):
        fixed = ["generate", str(tmp_path / "run"), "--prompt", "the cat", "--max-new-tokens", "8"]
        args = parser.parse_args([*fixed, *arguments])
        assert args.run(args) == 0
        return capsys.readouterr().out

    with pytest.raises(UserError, match="Give one with --tokenizer PATH"):
        text()
    named = ("--tokenizer", str(folder))
    greedy = text("--temperature", "0", *named)
    tokenizer = load_tokenizer(folder)
    with single_process():
        (model,) = build(RunConfig.model_validate({**values, "parallel": {}}))
        prompt = tokenizer.encode("the cat")
        expected = continuation(model.eval(), count=8, prompt=prompt, eos_id=tokenizer.eos_id)
    assert greedy == tokenizer.decode([*prompt, *expected]) + "\n"
    assert greedy.startswith("the cat")
    assert text("--seed", "5", *named) == text("--seed", "5", *named) != text("--seed", "6", *named)
