"""The whole path in one command: raw text to a trained, resumed, exported model that speaks.

Each step is the `litespark` command that a user would type; it is printed before it runs.  Training
starts at tensor parallel 2 x pipeline 2 with sequence parallelism, is stopped by a signal half-way,
and goes on at pipeline 2 x data parallel 2.  At the end `transformers` loads the export and must
find the same validation loss.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent.relative_to(ROOT)
WORK = Path("runs/quickstart")
CONFIG = str(HERE / "quickstart.yaml")
FIRST_LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
SECOND_LAYOUT = ["parallel.tensor=1", "parallel.pipeline=2"]
PROMPT = "A hacker is"

# Both losses are fp32 sums over the same tokens in another order of operations: 4 layers deep, a
# logit is off by a few 2^-23 of its size, and a mean over thousands of tokens by less.
LOSS_BOUND = 1e-5


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    steps: int
    overrides: tuple[str, ...]


SIZES = {
    "full": Size(600, ()),
    "short": Size(
        120,
        (
            "batch.global=8",
            "data.sequence_length=128",
            "training.eval_every=60",
            "training.eval_steps=2",
            "schedule.warmup_steps=10",
        ),
    ),
}


def main() -> int:
    """Run all steps; the exit code is that of the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full", help="how much is trained")
    size = SIZES[parser.parse_args().size]
    os.chdir(ROOT)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # four processes would have to share one GPU
    started = time.monotonic()
    if WORK.exists():
        print(f"removing {WORK}, left by an earlier quick start")
        shutil.rmtree(WORK)
    prepare_data()
    train(size)
    litespark("export", f"{WORK}/run", f"{WORK}/hf")
    check_with_transformers()
    text = litespark(
        *("generate", f"{WORK}/run", "--prompt", PROMPT, "--max-new-tokens", "40"),
        *("--temperature", "0.8", "--seed", "1"),
    )
    litespark("report", f"{WORK}/run")
    summarize(size, text, time.monotonic() - started)
    return 0


def prepare_data() -> None:
    """Train the tokenizer and turn the text into an indexed shard."""
    say("1. Text to tokens")
    corpus = HERE / "data" / "corpus.jsonl.zst"
    tokenizer = f"{WORK}/tokenizer"
    run(sys.executable, str(HERE / "train_tokenizer.py"), "--output", tokenizer)
    (WORK / "data").mkdir(parents=True)
    litespark(
        *("preprocess", "--input", str(corpus), "--tokenizer", tokenizer),
        *("--output-prefix", f"{WORK}/data/corpus", "--workers", "2"),
    )


def train(size: Size) -> None:
    """Train half-way at one layout, stop by a signal, and resume at another."""
    common = [CONFIG, "--nproc", "4", f"training.steps={size.steps}", *size.overrides]
    say(f"2. Train to half of {size.steps} steps at TP2 x PP2 with sequence parallelism, then stop")
    command = [*LITESPARK, "train", *common, *FIRST_LAYOUT]
    show(command)
    process = subprocess.Popen(command)
    while process.poll() is None and last_step() < size.steps // 2:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    print("   (SIGTERM sent, as a scheduler would before it takes the machine away)")
    if process.wait() != 3:
        raise SystemExit(f"training ended with {process.returncode}, expected 3 (saved, stopped)")
    say("3. Resume by itself at PP2 x DP2 and finish")
    litespark("train", *common, *SECOND_LAYOUT)


def check_with_transformers() -> None:
    """Compute the validation loss of the export with transformers, on the same samples."""
    say("4. transformers computes the same loss from the exported folder")
    run(
        *(sys.executable, str(HERE / "loss_with_transformers.py")),
        *("--model", f"{WORK}/hf", "--config", f"{WORK}/run/config.yaml"),
        *("--output", f"{WORK}/transformers_loss.json"),
    )
    theirs = json.loads((WORK / "transformers_loss.json").read_text())["loss"]
    ours = validation_losses()[-1]
    difference = abs(ours - theirs) / theirs
    print(
        f"   Litespark {ours:.6f}, transformers {theirs:.6f}, relative difference {difference:.1e}"
    )
    if difference > LOSS_BOUND:
        raise SystemExit(f"the losses differ by more than {LOSS_BOUND:g}: the export is wrong")


def summarize(size: Size, text: str, seconds: float) -> None:
    """Print what was done, the losses beside what they mean, and where the report is."""
    tokenizer = json.loads((WORK / "tokenizer" / "tokenizer_report.json").read_text())
    records = [record for record in metrics() if "loss" in record]
    entropy = tokenizer["unigram_entropy_nats_per_token"]
    tokens = records[-1]["tokens"]
    say(f"Done in {seconds / 60:.1f} minutes")
    print(
        f"   {tokenizer['bytes'] / 1e6:.1f} MB of text -> {tokenizer['tokens']:,} tokens; trained "
        f"{size.steps} steps, {tokens:,} tokens, on 4 processes at 2 layouts\n"
        f"   loss {records[0]['loss']:.3f} -> {records[-1]['loss']:.3f}, "
        f"validation {validation_losses()[-1]:.3f} nats per token\n"
        f"   a model that knew only how often each token occurs would have {entropy:.3f} "
        f"(unigram entropy), one that knew nothing {math.log(2048):.3f}\n"
        f"   it says: {text.strip()!r}\n"
        f"   Hugging Face model: {WORK}/hf\n"
        f"   report: {WORK}/run/report.html"
    )


LITESPARK = (sys.executable, "-m", "litespark")


def litespark(*arguments: str) -> str:
    """Run a litespark command and return what it printed."""
    return run(*LITESPARK, *arguments)


def run(*command: str) -> str:
    """Show a command, run it, pass its output on and return it.

    Raises:
        SystemExit: the command failed.
    """
    show(command)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(f"   {line}", end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"{shlex.join(command)} ended with exit code {process.returncode}")
    return "".join(lines)


def show(command: Sequence[str]) -> None:
    """Print a command as a user would type it."""
    words = ["litespark", *command[3:]] if tuple(command[:3]) == LITESPARK else list(command)
    words = ["python" if word == sys.executable else word for word in words]
    print(f"$ {shlex.join(words)}", flush=True)


def say(title: str) -> None:
    """Print the title of a step."""
    print(f"\n== {title}", flush=True)


def metrics() -> list[dict]:
    """The records that training has written so far."""
    path = WORK / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step() -> int:
    """The last logged step, 0 before the first."""
    records = metrics()
    return records[-1]["step"] if records else 0


def validation_losses() -> list[float]:
    """The results of the evaluations in their order."""
    return [record["validation_loss"] for record in metrics() if "validation_loss" in record]


if __name__ == "__main__":
    raise SystemExit(main())
