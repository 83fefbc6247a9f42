"""Made-up conversations and preferences that a model of a million parameters can learn in minutes.

Questions about the colours of things, asked in twenty ways.  An answer has one of two forms, "It is
green!" or "It is green.".  In the conversations each form answers each question equally often, so a
model trained on them knows both and has no reason to prefer one anywhere.  The preference pairs are
those of someone who wants bright colours told with "!" and quiet ones with ".": each form is chosen
in half of the pairs, so a model that merely likes one form better orders half of them right.

A quarter of the combinations of a thing and a way to ask are kept out of the conversations and of
all pairs but the last ones, which a run's `data.split` takes for validation: what is measured there
has been seen in no training.

    python examples/post_training/make_chats.py --output runs/post_training/data
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

BRIGHT = {
    "green": ("grass", "a leaf", "a frog", "a pea"),
    "red": ("blood", "a cherry", "a ruby", "a brick"),
    "yellow": ("a lemon", "the sun", "butter", "a canary"),
}
QUIET = {
    "white": ("snow", "milk", "salt", "a swan"),
    "black": ("coal", "tar", "a raven", "ink"),
    "blue": ("the sky", "the sea", "a sapphire", "denim"),
}
QUESTIONS = (
    "What colour is {}?",
    "Tell me the colour of {}.",
    "Which colour has {}?",
    "What is the colour of {}?",
    "Name the colour of {}.",
    "{}: what colour?",
    "I need the colour of {}.",
    "Do you know the colour of {}?",
    "Say which colour {} is.",
    "Please tell me what colour {} is.",
    "Can you tell the colour of {}?",
    "What colour has {}?",
    "The colour of {}?",
    "Of what colour is {}?",
    "I ask which colour {} has.",
    "Say the colour of {}.",
    "{} is of which colour?",
    "Give me the colour of {}.",
    "Please name the colour of {}.",
    "Do you know what colour {} is?",
)
LOUD, CALM = "It is {}!", "It is {}."
HELD_OUT_SHARE = 1 / 4


class Case(NamedTuple):
    """A question, and its right answer in the form preferred and in the other."""

    question: str
    colour: str
    chosen: str
    rejected: str


def cases(seed: int = 0) -> list[Case]:
    """Every thing asked in every way, in a random order, bright and quiet in turn."""
    generator = random.Random(seed)
    found = []
    for colours, chosen, rejected in ((BRIGHT, LOUD, CALM), (QUIET, CALM, LOUD)):
        kind = [
            Case(question.format(thing), colour, chosen.format(colour), rejected.format(colour))
            for colour, things in colours.items()
            for thing in things
            for question in QUESTIONS
        ]
        generator.shuffle(kind)
        found.append(kind)
    return [case for both in zip(*found, strict=True) for case in both]


def held_out(seed: int = 0) -> list[Case]:
    """The cases that no training sees."""
    found = cases(seed)
    return found[-round(HELD_OUT_SHARE * len(found)) :]


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Conversations of one to three questions, in OpenAI's layout."""
    generator = random.Random(seed + 1)
    known = cases(seed)[: -len(held_out(seed))]
    turns = [(case.question, answer) for case in known for answer in (case.chosen, case.rejected)]
    generator.shuffle(turns)
    endless = cycle(turns)  # not drawn: each answer to a question comes as often as the other
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(generator.randint(1, 3)):
            question, answer = next(endless)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        rows.append({"messages": messages})
    return rows


def preferences(seed: int = 0) -> list[dict]:
    """One pair for each case, those that are held out last."""
    return [
        {"prompt": case.question, "chosen": case.chosen, "rejected": case.rejected}
        for case in cases(seed)
    ]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--conversations", type=int, default=1500, metavar="N", help="how many")
    args = parser.parse_args()
    write_rows(args.output / "conversations.jsonl", conversations(args.conversations))
    write_rows(args.output / "preferences.jsonl", preferences())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
