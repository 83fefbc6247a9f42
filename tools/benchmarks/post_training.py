"""SFT and DPO beside pre-training of the same model, and beside TRL: tokens/s, energy, memory.

    python tools/benchmarks/post_training.py --json post_training.json
    python tools/benchmarks/post_training.py --model tiny --seq-length 512 --precision fp32

Four measurements, each in a process of its own, one after the other on one GPU:

    pretrain   litespark bench on random tokens
    sft        litespark bench on conversations packed into samples of the same length
    dpo        litespark bench on packed pairs, reference log-probabilities precomputed
    trl        TRL's DPOTrainer on the same pairs, reference log-probabilities precomputed; left out
               where TRL is not installed

Weights and tokens are random, lengths are those of chats: geometric, half of a conversation is
answers.  A step of the first three has the same number of places; of sft and dpo the share that
holds a token is told.  TRL pads each batch to its longest answer; its tokens are counted without
the padding.  TRL runs as its DPOConfig comes (bf16 autocast over fp32 weights, gradient
checkpointing), with the batch that --trl-batch names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The folder of this script would be searched first, and its kernels.py taken for the package
# `kernels`; the checkout in its place makes litespark importable where it is not installed.
ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

Record = dict[str, Any]
_SAMPLES = 96  # packed samples of the shards: more than the steps read
_SHOWN = ("tokens_per_second", "joules_per_1000_tokens", "peak_memory_gib", "step_seconds")


def main() -> int:
    """Measure what was asked for and print the table; returns the exit code."""
    args = parser().parse_args()
    if args.only_trl is not None:
        print(json.dumps(measure_trl(args, args.only_trl)), flush=True)
        return 0
    deadline = time.monotonic() + args.seconds
    results: Record = {"model": args.model, "sequence_length": args.seq_length}
    with tempfile.TemporaryDirectory(prefix="litespark-post-") as folder:
        shards = {task: write_shard(Path(folder), task, args) for task in ("sft", "dpo")}
        results["fill"] = {task: shard["fill"] for task, shard in shards.items()}
        for name in args.measure:
            left = deadline - time.monotonic()
            if left < 20:
                results[name] = {"failed": "no time was left"}
                continue
            command = command_for(name, args, shards, Path(folder))
            results[name] = run(command, Path(folder) / f"{name}.json", left)
            print(f"{name}: {line_of(results[name])}", flush=True)
    add_ratios(results)
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--model", default="paper-3b", metavar="PRESET", help="shape (default: paper-3b)")
    add("--precision", default="bf16", help="of Litespark's runs (default: bf16)")
    add("--seq-length", type=int, default=4096, help="places of a sample (default: 4096)")
    add("--mean-length", type=int, default=400, help="mean tokens of a conversation (default: 400)")
    add("--micro-batch", type=int, default=4, help="samples of one forward pass (default: 4)")
    add("--accumulate", type=int, default=2, help="micro-batches of a step (default: 2)")
    add("--warmup", type=int, default=3, help="steps before the timed ones (default: 3)")
    add("--steps", type=int, default=8, help="timed steps (default: 8)")
    add("--trl-batch", type=int, default=8, help="pairs of one of TRL's forward passes")
    add("--trl-steps", type=int, default=8, help="TRL's timed steps (default: 8)")
    add("--seconds", type=float, default=225, help="end after about this long (default: 225)")
    add("--measure", nargs="+", default=["pretrain", "sft", "dpo", "trl"], help="which of the four")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--only-trl", type=Path, metavar="PAIRS", help=argparse.SUPPRESS)
    return found


def write_shard(folder: Path, task: str, args: argparse.Namespace) -> Record:
    """Random conversations or pairs as `litespark preprocess` would write them; the prefix."""
    from litespark.config.schema import ModelConfig
    from litespark.data.chat_samples import ChatCorpus
    from litespark.data.chat_shards import ChatShard, answers_prefix
    from litespark.data.indexed import IndexedWriter
    from litespark.data.manifest import ChatRecord, Manifest, TokenizerRecord, write_manifest

    vocab_size = ModelConfig.model_validate({"preset": args.model}).vocab_size
    generator = np.random.default_rng(0)
    prefix = str(folder / f"random_{task}_document")
    places = _SAMPLES * args.seq_length
    tokens = IndexedWriter(prefix, vocab_size)
    answers = IndexedWriter(answers_prefix(prefix), 2**31 - 1)
    while tokens.tokens < places:
        for prompt, answer in random_unit(generator, task, args):
            tokens.add_document(generator.integers(0, vocab_size, prompt + answer))
            answers.add_document([prompt, prompt + answer])
    files, answer_files = tokens.seal(), answers.seal()
    tokens.publish()
    answers.publish()
    documents = files.documents // (2 if task == "dpo" else 1)
    chats = ChatRecord(
        task=task,
        template_sha256="",
        turns="all",
        max_tokens=args.seq_length,
        rows=documents,
        kept=documents,
        truncated=0,
        left_out={},
        longest_tokens=args.seq_length,
        answer_tokens=0,
        answers=answer_files,
    )
    write_manifest(
        prefix,
        Manifest(
            tokenizer=TokenizerRecord("random", "random", vocab_size, None),
            append_eod=False,
            json_key=task,
            sources=(),
            files=files,
            skipped_bad_lines=0,
            replaced_surrogates=0,
            litespark_version="random",
            chats=chats,
        ),
    )
    shard = ChatShard(prefix, task)  # type: ignore[arg-type] - one of the two
    return {
        "prefix": prefix,
        "fill": ChatCorpus(shard, (0, shard.units), args.seq_length, 0).fill,
        "pairs": pairs_file(folder, shard) if task == "dpo" else None,
    }


def random_unit(
    generator: np.random.Generator, task: str, args: argparse.Namespace
) -> list[tuple[int, int]]:
    """Lengths of prompt and answer: one conversation, or two with one prompt's length."""

    def length() -> int:
        longest = args.seq_length // 4
        return int(min(longest, max(2, generator.geometric(2 / args.mean_length))))

    prompt = length()
    return [(prompt, length()) for _ in range(2 if task == "dpo" else 1)]


def pairs_file(folder: Path, shard: Any) -> Path:
    """The same pairs for TRL: token ids, as JSON lines."""
    path = folder / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for unit in range(shard.units):
            chosen, rejected = (shard.tokens.read(2 * unit + n).tolist() for n in (0, 1))
            prompt = int(shard.answers_of(2 * unit)[0, 0])
            row = {
                "prompt_ids": chosen[:prompt],
                "chosen_ids": chosen[prompt:],
                "rejected_ids": rejected[prompt:],
            }
            file.write(json.dumps(row) + "\n")
    return path


def command_for(name: str, args: argparse.Namespace, shards: Record, folder: Path) -> list[str]:
    """The process that measures `name` and leaves its result in `folder`."""
    if name == "trl":
        words = [sys.executable, str(Path(__file__).resolve()), "--only-trl"]
        words += [str(shards["dpo"]["pairs"]), "--model", args.model]
        for option in ("seq_length", "warmup", "trl_batch", "trl_steps", "precision"):
            words += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        return words
    words = [sys.executable, "-m", "litespark", "bench", "--model", args.model, "--no-profile"]
    words += ["--precision", args.precision, "--json", str(folder / f"{name}.json")]
    for option in ("seq_length", "micro_batch", "accumulate", "warmup", "steps"):
        words += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    if args.precision == "fp8":  # with delayed scales a reference cannot be asked first
        words += ["--recipe", "tensorwise"]
    if name != "pretrain":
        words += ["--data", shards[name]["prefix"], f"task={name}"]
    return words


def run(command: list[str], result: Path, seconds: float) -> Record:
    """What a measurement found, or why it found nothing; its own file or its last line."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=ROOT,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(result.read_text() if result.exists() else lines[-1])
    except (ValueError, IndexError):
        return {"failed": (done.stderr or done.stdout).strip()[-2000:]}


def measure_trl(args: argparse.Namespace, pairs: Path) -> Record:
    """TRL's DPOTrainer on pairs of token ids."""
    import torch

    from litespark.metering.energy import EnergyMeter
    from litespark.metering.memory import peak_memory_bytes

    try:
        import trl
        from datasets import Dataset
    except ImportError as error:
        return {"failed": f"TRL is not installed ({error})"}
    from transformers import TrainerCallback

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    tokens_of = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"] + r["rejected_ids"]) for r in rows]
    total_steps = args.warmup + args.trl_steps
    meter, marks = EnergyMeter(), []
    on_gpu = torch.cuda.is_available()

    class Clock(TrainerCallback):
        """Notes the time and the energy when the timed steps begin and end."""

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (args.warmup, total_steps):
                if on_gpu:
                    torch.cuda.synchronize()
                marks.append((time.perf_counter(), meter.read_joules()))

    trainer = trl_trainer(args, Dataset.from_list(rows), total_steps)
    seen: list[int] = []
    collate = trainer.data_collator

    def counting(examples: list[Record]) -> Any:
        seen.append(
            sum(
                2 * len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"])
                for e in examples
            )
        )
        return collate(examples)

    trainer.data_collator = counting
    trainer.add_callback(Clock())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    (started, joules), (ended, joules_end) = marks
    timed_tokens = sum(tokens_of[: args.trl_batch * total_steps]) * args.trl_steps / total_steps
    if len(seen) >= total_steps:
        timed_tokens = sum(seen[args.warmup : total_steps])
    seconds = ended - started
    used = None if joules is None or joules_end is None else joules_end - joules
    return {
        "implementation": f"TRL {trl.__version__}",
        "tokens_per_second": timed_tokens / seconds,
        "joules_per_1000_tokens": None if used is None else 1000 * used / timed_tokens,
        "peak_memory_gib": peak_memory_bytes("cuda" if on_gpu else "cpu") / 2**30,
        "step_seconds": seconds / args.trl_steps,
        "batch": args.trl_batch,
    }


def trl_trainer(args: argparse.Namespace, dataset: Any, total_steps: int) -> Any:
    """The trainer with random weights, given token ids and constant reference values."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    from litespark.config.schema import ModelConfig

    shape = ModelConfig.model_validate({"preset": args.model})
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=shape.tie_embeddings,
    )
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = LlamaForCausalLM(config)
    vocabulary = {"<pad>": 0, "</s>": 1, "x": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="x")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.trl_batch,
        max_steps=total_steps,
        max_length=None,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        bf16=args.precision != "fp32",
        use_cpu=not on_gpu,
        optim="adamw_torch_fused",
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    # The reference costs nothing in either framework's timed steps: constants stand for it here.
    values = [-100.0] * len(dataset)
    dataset = dataset.add_column("ref_chosen_logps", values)
    dataset = dataset.add_column("ref_rejected_logps", values)
    dpo_trainer.hash_module = lambda _: "random"  # only names the cache of the reference
    DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset
    DPOTrainer._precompute_ref_logps = lambda self, dataset, *_: dataset
    return DPOTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
    )


def add_ratios(results: Record) -> None:
    """What the issue asks: SFT to pre-training, DPO to TRL."""
    for name, one, other in (
        ("sft_to_pretrain", "sft", "pretrain"),
        ("dpo_to_pretrain", "dpo", "pretrain"),
        ("dpo_to_trl", "dpo", "trl"),
    ):
        rates = [results.get(key, {}).get("tokens_per_second") for key in (one, other)]
        if all(rates):
            results[name] = real_rate(results, one) / real_rate(results, other)
            results[f"{name}_by_places"] = rates[0] / rates[1]


def real_rate(results: Record, name: str) -> float:
    """Tokens per second without the padding of packed samples."""
    return results[name]["tokens_per_second"] * results["fill"].get(name, 1.0)


def line_of(result: Record) -> str:
    """One measurement in a line."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    shown = {key: result.get(key) for key in _SHOWN}
    return ", ".join(
        f"{key} {value:,.2f}" for key, value in shown.items() if isinstance(value, float)
    )


def table(results: Record) -> str:
    """The summary."""
    names = [name for name in ("pretrain", "sft", "dpo", "trl") if name in results]
    lines = [f"{name:<9} {line_of(results[name])}" for name in names]
    lines += [f"places that hold a token: {results['fill']}"]
    lines += [f"{key} {value:.3f}" for key, value in results.items() if "_to_" in key]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
