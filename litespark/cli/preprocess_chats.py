"""The part of `litespark preprocess` that is about conversations and preference pairs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from litespark.cli.exits import unwind_on_sigterm
from litespark.errors import UserError

if TYPE_CHECKING:  # the help must not wait for numpy
    from collections.abc import Callable

    from litespark.data.chat_job import ChatCounts, ChatOptions
    from litespark.data.manifest import Manifest

_SHOWN = 5  # of the rows left out
# Options of plain text, which a conversation's rows have no use for, and their defaults.
_PLAIN_TEXT_ONLY = {
    "json_key": ["text"],
    "split_by": None,
    "append_eod": True,
    "prepend_bos": False,
    "resume": False,
}


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --task and the options that go with sft and dpo."""
    parser.add_argument(
        "--task",
        choices=("pretrain", "sft", "dpo"),
        default="pretrain",
        help="what the rows are: plain text (default), conversations, or preference pairs",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="sft, dpo: a Jinja chat template (default: the tokenizer's chat_template.jinja, or "
        "chat_template in its tokenizer_config.json)",
    )
    parser.add_argument(
        "--turns",
        choices=("all", "last"),
        default="all",
        help="sft: train on all answers of a conversation (default) or on its last one",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="sft, dpo: longest conversation, or pair of answers with their prompts, in tokens: "
        "data.sequence_length of the run (default: no limit)",
    )
    parser.add_argument(
        "--over-long",
        choices=("drop", "truncate"),
        default="drop",
        help="sft: leave longer conversations out (default) or cut them; both are counted",
    )


def refuse_chat_options(args: argparse.Namespace) -> None:
    """Refuse options of conversations for plain text.

    Raises:
        UserError: one was given.
    """
    for name, default in (
        ("chat_template", None),
        ("turns", "all"),
        ("max_length", None),
        ("over_long", "drop"),
    ):
        if getattr(args, name) != default:
            raise _no_effect(name, "pretrain", "add --task sft or --task dpo")


def _no_effect(name: str, task: str, other_way: str) -> UserError:
    option = f"--{name.replace('_', '-')}"
    return UserError(option, f"has no effect with --task {task}", f"Leave it out, or {other_way}.")


def run_chats(args: argparse.Namespace) -> int:
    """Run `preprocess --task sft|dpo`; return its exit code.

    Raises:
        LitesparkError: see `litespark.data.chat_job.preprocess_chats`.
    """
    for name, default in _PLAIN_TEXT_ONLY.items():
        if getattr(args, name) != default:
            raise _no_effect(name, args.task, "leave out --task")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from litespark.data.chat_job import ChatOptions, preprocess_chats

    options = ChatOptions(
        task=args.task,
        inputs=tuple(args.input),
        tokenizer=args.tokenizer,
        output_prefix=args.output_prefix,
        chat_template=args.chat_template,
        turns=args.turns,
        max_tokens=args.max_length,
        over_long=args.over_long,
        workers=args.workers,
        on_error=args.on_error,
        max_errors=args.max_errors,
        overwrite=args.overwrite,
    )
    unwind_on_sigterm()
    with _progress_line() as show:
        manifest, counts = preprocess_chats(options, show)
    sys.stdout.write(summary(options, manifest, counts))
    return 0


@contextmanager
def _progress_line() -> Iterator[Callable[[ChatCounts], None]]:
    """Give a function that shows progress: a live line on a terminal, nothing in a log file."""
    if not sys.stderr.isatty():
        yield lambda counts: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("starting", total=None)
        yield lambda counts: display.update(
            task, description=f"{counts.rows:,} rows  {counts.tokens:,} tokens"
        )


def summary(options: ChatOptions, manifest: Manifest, counts: ChatCounts) -> str:
    """The lines printed at the end."""
    what = "pairs" if options.task == "dpo" else "conversations"
    share = counts.answer_tokens / max(counts.tokens, 1)
    lines = [
        f"wrote {options.shard_prefix}.bin, .idx, .json and {options.output_prefix}_"
        f"{options.task}_answers.bin, .idx",
        f"  {what:<13} {counts.kept:,} of {counts.rows:,} rows "
        f"from {len(manifest.sources):,} files, the longest {counts.longest_tokens:,} tokens",
        f"  tokens        {counts.tokens:,}, of which {counts.answer_tokens:,} are answers' "
        f"({100 * share:.1f} %)",
    ]
    if counts.truncated:
        lines.append(f"  cut           {counts.truncated:,} at {options.max_tokens:,} tokens")
    if counts.listed:
        lines.append(
            f"left out {len(counts.listed):,} rows, listed in {options.quarantine_path}; by reason:"
        )
        lines += [f"  {count:,} {reason}" for reason, count in counts.left_out.most_common()]
        lines += ["the first of them:", *(f"  {line}" for line in counts.listed[:_SHOWN])]
    return "\n".join(lines) + "\n"
