"""Made-up conversations and preferences that a model of a million parameters can learn in minutes.

Questions about the colours of things, asked in ten ways.  In the conversations half of the answers
have the form "Answer: green." and half "I think it is green.", so that a model trained on them has
no reason to prefer one.  In the preference pairs the first form is chosen and the second rejected.

A twelfth of the combinations of a thing and a way to ask are kept out of the conversations and of
all pairs but the last ones, which a run's `data.split` takes for validation: what is measured there
has been seen in no training.

    python examples/post_training/make_chats.py --output runs/post_training/data
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

COLOURS = {
    "green": ("grass", "a leaf", "a frog", "a pea"),
    "white": ("snow", "milk", "salt", "a swan"),
    "red": ("blood", "a cherry", "a ruby", "a brick"),
    "yellow": ("a lemon", "the sun", "butter", "a canary"),
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
)
CHOSEN, REJECTED = "Answer: {}.", "I think it is {}."
HELD_OUT_SHARE = 1 / 12


def combinations(seed: int = 0) -> list[tuple[str, str]]:
    """(question, colour) of every thing asked in every way, in a random order."""
    found = [
        (question.format(thing), colour)
        for colour, things in COLOURS.items()
        for thing in things
        for question in QUESTIONS
    ]
    random.Random(seed).shuffle(found)
    return found


def held_out(seed: int = 0) -> list[tuple[str, str]]:
    """The combinations that no training sees."""
    found = combinations(seed)
    return found[-round(HELD_OUT_SHARE * len(found)) :]


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Conversations of one to three questions, in OpenAI's layout."""
    generator = random.Random(seed + 1)
    known = combinations(seed)[: -len(held_out(seed))]
    rows = []
    for _ in range(count):
        messages = []
        for question, colour in generator.sample(known, generator.randint(1, 3)):
            answer = generator.choice((CHOSEN, REJECTED)).format(colour)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        rows.append({"messages": messages})
    return rows


def preferences(seed: int = 0) -> list[dict]:
    """One pair for each combination, those that are held out last."""
    return [
        {
            "prompt": question,
            "chosen": CHOSEN.format(colour),
            "rejected": REJECTED.format(colour),
        }
        for question, colour in combinations(seed)
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
