"""Pre-training, SFT, DPO, export, answers: the whole path of a chat model, on a CPU, with figures.

Each step is the `litespark` command that a user would type.  The conversations are made up
(`make_chats.py`): questions about colours, answered in one of two forms.  SFT teaches both forms
alike; DPO prefers one.  At the end `transformers` loads both exports and answers questions that no
training has seen; told are how many answers have the preferred form, and how many name the right
colour, before and after DPO.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)
WORK = Path("runs/post_training")
CORPUS = Path("examples/quickstart/data/corpus.jsonl.zst")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY_SIZE = 1024
LITESPARK = (sys.executable, "-m", "litespark")


def main() -> int:
    """Run all steps; the exit code is that of the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lora", action="store_true", help="train adapters in DPO, merge them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    started = time.monotonic()
    prepare_data()
    lora = ["lora.rank=8", "optimizer.lr=5e-4"] if args.lora else []
    for task, overrides in (("pretrain", []), ("sft", []), ("dpo", lora)):
        say(f"Train: {task}")
        litespark("train", str(HERE / f"{task}.yaml"), *overrides)
    say("Export, and answer what no training has seen")
    figures: dict[str, Any] = {}
    for task in ("sft", "dpo"):
        litespark("export", str(WORK / task), str(WORK / f"hf_{task}"))
        figures[task] = answers(WORK / f"hf_{task}")
    question = held_out()[0][0]
    figures["said"] = litespark(
        *("generate", str(WORK / "dpo"), "--chat", "--prompt", question),
        *("--temperature", "0", "--max-new-tokens", "24"),
    ).strip()
    figures["question"] = question
    figures["reference_prefers"] = reference_prefers()
    figures["validation"] = {task: validation(task) for task in ("pretrain", "sft", "dpo")}
    figures["minutes"] = (time.monotonic() - started) / 60
    summarize(figures)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def prepare_data() -> None:
    """The tokenizer with ChatML's control tokens, the text, the conversations, the pairs."""
    say("Text, conversations and preferences to tokens")
    shutil.rmtree(ROOT / WORK, ignore_errors=True)
    train_tokenizer(ROOT / WORK / "tokenizer")
    run(sys.executable, str(HERE / "make_chats.py"), "--output", str(WORK / "data"))
    common = ("--tokenizer", str(WORK / "tokenizer"), "--workers", "1")
    litespark(
        *("preprocess", "--input", str(CORPUS), *common),
        *("--output-prefix", str(WORK / "data" / "corpus")),
    )
    for task, name in (("sft", "conversations"), ("dpo", "preferences")):
        litespark(
            *("preprocess", "--task", task, "--input", str(WORK / "data" / f"{name}.jsonl")),
            *(*common, "--output-prefix", str(WORK / "data" / "chats"), "--max-length", "128"),
        )


def train_tokenizer(folder: Path) -> None:
    """A byte-level BPE with a chat template, as a Hugging Face folder."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from tokenizers import AddedToken
    from train_tokenizer import read_texts, train_byte_level_bpe

    tokenizer = train_byte_level_bpe(read_texts(ROOT / CORPUS), VOCABULARY_SIZE - 2)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def held_out() -> list[tuple[str, str]]:
    """Questions and colours that no training has seen."""
    sys.path.insert(0, str(ROOT / HERE))
    from make_chats import held_out as of_seed

    return of_seed()


def answers(folder: Path) -> dict[str, Any]:
    """What an export says to the questions that were held out, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / folder)
    model = AutoModelForCausalLM.from_pretrained(ROOT / folder)
    said = []
    for question, colour in held_out():
        message = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].size(1) :], skip_special_tokens=True)
        said.append((question, colour, text.strip()))
    return {
        "asked": len(said),
        "preferred_form": sum(text.startswith("Answer: ") for _, _, text in said),
        "right_colour": sum(text.endswith(f" {colour}.") for _, colour, text in said),
        "first": said[:4],
    }


def reference_prefers() -> int:
    """How many of the pairs held out the model before DPO puts in the chosen order."""
    import numpy as np

    folder = ROOT / WORK / "data" / "chats_dpo_document_reference"
    (path,) = folder.glob("*.npy")
    chosen, rejected = np.load(path).reshape(-1, 2)[-len(held_out()) :].T
    return int((chosen > rejected).sum())


def validation(task: str) -> list[dict[str, Any]]:
    """The evaluations of a run, in order."""
    lines = (ROOT / WORK / task / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "validation_loss" in record]


def summarize(figures: dict[str, Any]) -> None:
    """Print what was found."""
    say(f"Done in {figures['minutes']:.1f} minutes")
    for task in ("pretrain", "sft", "dpo"):
        losses = [f"{record['validation_loss']:.4f}" for record in figures["validation"][task]]
        print(f"   {task}: validation loss {' -> '.join(losses)}")
    print(
        f"   before dpo the likelier answer is the chosen one in {figures['reference_prefers']} of "
        f"{len(held_out())} pairs held out"
    )
    for record in figures["validation"]["dpo"]:
        print(
            f"   dpo, step {record['step']}: {100 * record['validation_reward_accuracy']:.0f} % of "
            f"the pairs held out are ordered right, margin {record['validation_reward_margin']:.3f}"
        )
    for task in ("sft", "dpo"):
        found = figures[task]
        print(
            f"   after {task}, of {found['asked']} questions held out: {found['preferred_form']} "
            f"answers have the preferred form, {found['right_colour']} name the right colour"
        )
    print(f"   {figures['question']!r} -> {figures['said']!r}")


def litespark(*arguments: str) -> str:
    """Run a litespark command and return what it printed."""
    return run(*LITESPARK, *arguments)


def run(*command: str) -> str:
    """Show a command, run it in the checkout's root, pass its output on and return it.

    Raises:
        SystemExit: the command failed.
    """
    words = ["litespark", *command[3:]] if command[:3] == LITESPARK else ["python", *command[1:]]
    print(f"$ {shlex.join(words)}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    print("".join(f"   {line}\n" for line in done.stdout.splitlines()), end="", flush=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)} ended with exit code {done.returncode}")
    return done.stdout


def say(title: str) -> None:
    """Print the title of a step."""
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
