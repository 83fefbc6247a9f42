"""Pre-training, SFT, DPO, export, answers: the whole path of a chat model, on a CPU, with figures.

Each step is the `litespark` command that a user would type.  The conversations are made up
(`make_chats.py`): questions about colours, answered in one of two forms.  SFT teaches both alike;
DPO prefers one for half of the colours and the other for the rest.
At the end `transformers` loads both exports and takes up what no training has seen; told are,
before and after DPO, in how many pairs the chosen answer is the likelier one, how many of its own
answers have the preferred form, and how many name the right colour.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from make_chats import Case

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
        figures[task] = judge(WORK / f"hf_{task}")
    figures["said"] = {
        case.question: litespark(
            *("generate", str(WORK / "dpo"), "--chat", "--prompt", case.question),
            *("--temperature", "0", "--max-new-tokens", "24"),
        ).strip()
        for case in held_out()[:2]
    }
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


def held_out() -> list[Case]:
    """The cases that no training has seen."""
    sys.path.insert(0, str(ROOT / HERE))
    from make_chats import held_out as of_seed

    return of_seed()


def judge(folder: Path) -> dict[str, Any]:
    """What an export makes of the cases held out: their pairs, and its own greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # a model this small is slower with more
    tokenizer = AutoTokenizer.from_pretrained(ROOT / folder)
    model = AutoModelForCausalLM.from_pretrained(ROOT / folder)
    found = {"asked": 0, "ordered_right": 0, "preferred_form": 0, "right_colour": 0}
    said = []
    for case in held_out():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": case.question}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
        start = ids["input_ids"].size(1)
        text = tokenizer.decode(out[0, start:], skip_special_tokens=True).strip()
        chosen, rejected = (
            answer_logp(model, tokenizer(f"{prompt}{answer}<|im_end|>", return_tensors="pt"), start)
            for answer in (case.chosen, case.rejected)
        )
        found["asked"] += 1
        found["ordered_right"] += chosen > rejected
        found["preferred_form"] += text[-1:] == case.chosen[-1]
        found["right_colour"] += text[:-1].endswith(f" {case.colour}")
        said.append((case.question, text, chosen - rejected))
    return {**found, "said": said}


def answer_logp(model: Any, tokens: Any, start: int) -> float:
    """Log-probability of the tokens from `start` on, given those before, in nats."""
    import torch

    with torch.no_grad():
        logps = model(**tokens).logits[0, start - 1 : -1].float().log_softmax(-1)
    return float(logps.gather(1, tokens["input_ids"][0, start:, None]).sum())


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
    for record in figures["validation"]["dpo"]:
        share, margin = (record[f"validation_reward_{name}"] for name in ("accuracy", "margin"))
        print(
            f"   dpo, step {record['step']}: {100 * share:.0f} % of the pairs held out have moved "
            f"to the chosen answer, margin {margin:.3f}"
        )
    for task in ("sft", "dpo"):
        found = figures[task]
        print(
            f"   after {task}, of {found['asked']} cases held out: {found['ordered_right']} pairs "
            f"are ordered right, {found['preferred_form']} answers have the preferred form, "
            f"{found['right_colour']} name the right colour"
        )
    for question, answer in figures["said"].items():
        print(f"   {question!r} -> {answer!r}")


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
