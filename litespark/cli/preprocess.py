"""`litespark preprocess`: text files to an indexed shard."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_command
from litespark.cli.exits import unwind_on_sigterm
from litespark.cli.preprocess_chats import add_chat_arguments, refuse_chat_options, run_chats
from litespark.errors import UserError
from litespark.utils.processes import available_cores

if TYPE_CHECKING:  # the help must not wait for numpy
    from litespark.data.manifest import Manifest
    from litespark.data.options import PreprocessOptions, Progress

_DESCRIPTION = """\
Turn text into indexed shards that `litespark train` (and Megatron-LM) reads.

Input is JSON lines, one object a line with the text under --json-key (.jsonl, .jsonl.zst,
.jsonl.gz), parquet with a column of that name, or plain text (.txt, .txt.zst, .txt.gz), one
document a file.  Name files, folders (searched recursively, in sorted order) or quoted globs, also
in an S3-compatible store (s3://BUCKET/NAME, extra s3; parquet only from this machine).
SlimPajama's tree works as it is.  In a folder that holds other data, .txt files are passed over.

Output is P_text_document.bin (token ids), .idx (where each document is) and .json (the manifest:
counts, checksums, the tokenizer's hash, the sources with their hashes).  They appear whole when the
job ends, or not at all.  Documents keep the order of the input, and the bytes are the same for
every number of workers.  With --split-by, each sub-source has a shard of its own,
P_SUBSOURCE_text_document; with several keys, each key has.

With --output-prefix s3://BUCKET/NAME the shards are written below $TMPDIR first and then sent.

Until then the work lies in the folder P.partial.  A job that was killed, or met a full disk, goes
on there with --resume and the same options, and ends with the same bytes; without --resume that
work is removed.

With --task sft the rows are conversations and with --task dpo preference pairs, in OpenAI's,
ShareGPT's or Alpaca's layout, written as text by the tokenizer's chat template; the output is
P_sft_document or P_dpo_document with P_sft_answers or P_dpo_answers, which says what is trained on.

Text is data: "</s>" inside a document is tokenized as text and never becomes a control token.
Lone surrogates, which no UTF-8 text can hold, become U+FFFD and are counted.
"""

_EPILOG = """\
examples:
  litespark preprocess --input corpus.jsonl --tokenizer llama2/ --output-prefix data/corpus
  litespark preprocess --input SlimPajama/train --tokenizer llama2/tokenizer.model \\
      --output-prefix data/slim --split-by meta.redpajama_set_name --workers 32 \\
      --on-error skip --resume
  litespark preprocess --task sft --input chats.jsonl --tokenizer llama3/ \\
      --output-prefix data/chats --max-length 4096

exit codes: 0 done, 2 the input or an option is wrong (the message names the file and line, or
why the output's folder cannot be used), 1 anything else (disk full, a process killed); whatever the
end, no half-written output has a final name.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "preprocess",
        summary="turn text into an indexed shard",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_MODEL",
        help="a tokenizer.json, a sentencepiece tokenizer.model, Llama 3's tokenizer.model, a "
        "tekken.json, or a folder with one of them; local files only",
    )
    add_chat_arguments(parser)
    parser.add_argument(
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="key of the text in each object; part of the output's name; several keys give one "
        "shard each (default: text)",
    )
    add_common_arguments(parser)
    parser.set_defaults(run=run)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `tools/preprocess_data.py` shares."""
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="DATA",
        help="files, folders and globs, local or s3://..., taken in this order",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="path of the output without the ending _KEY_document; its folder is made",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="tokenizing processes (default: the cores this process may use, here %(default)s)",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-text token (default: append); "
        "an empty document stays empty",
    )
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="begin each document with the tokenizer's begin-of-text token (default: do not)",
    )
    parser.add_argument(
        "--split-by",
        metavar="KEY",
        help="write one shard for each value at this dotted path of the object, such as "
        "meta.redpajama_set_name (default: one shard for all)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a line that is no JSON object with a string under the key: stop the job, naming file "
        "and line (default), or skip it, count it and list it in P_quarantine.txt",
    )
    parser.add_argument(
        "--max-errors",
        type=int,
        default=100,
        metavar="N",
        help="with --on-error skip: stop all the same after more than N bad lines (default: 100)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the unfinished work of the same job, if there is any; options and inputs "
        "must be as they were, but for --workers, --on-error and --max-errors",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output if it is there already"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code.

    Raises:
        LitesparkError: see `litespark.data.preprocess.preprocess`.
    """
    if args.task != "pretrain":
        return run_chats(args)
    refuse_chat_options(args)
    return run_options(options_from(args, args.tokenizer, args.json_key))


def options_from(
    args: argparse.Namespace, tokenizer: str, json_keys: Sequence[str]
) -> PreprocessOptions:
    """Return the options of parsed arguments; tokenizer and keys have other names elsewhere."""
    from litespark.data.options import PreprocessOptions

    return PreprocessOptions(
        inputs=tuple(args.input),
        tokenizer=tokenizer,
        output_prefix=args.output_prefix,
        json_keys=tuple(json_keys),
        split_by=args.split_by,
        workers=args.workers,
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        on_error=args.on_error,
        max_errors=args.max_errors,
        overwrite=args.overwrite,
        resume=args.resume,
    )


def run_options(options: PreprocessOptions) -> int:
    """Preprocess with a progress line on a terminal and a summary at the end; return 0.

    Raises:
        LitesparkError: see `litespark.data.preprocess.preprocess`.
    """
    # Nothing here multiplies matrices; numpy's threads for it cost each process 50 ms.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from litespark.data.preprocess import Progress, preprocess
    from litespark.data.storage import is_remote
    from litespark.data.transfer import local_output

    if options.resume and is_remote(options.output_prefix):
        raise UserError(
            f"--resume with --output-prefix {options.output_prefix}",
            "what is unfinished lies on the machine that wrote it, not in the store",
            "Write to a local prefix, and send the shards with `litespark data copy`.",
        )
    unwind_on_sigterm()
    last = Progress()

    with (
        local_output(options.output_prefix, options.overwrite) as prefix,
        _progress_line() as show,
    ):

        def report(progress: Progress) -> None:
            nonlocal last
            last = progress
            show(progress)

        local = replace(options, output_prefix=prefix)
        manifests = preprocess(local, report, _say)
    sys.stdout.write(summary(options, manifests, last))
    return 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


@contextmanager
def _progress_line() -> Iterator[Callable[[Progress], None]]:
    """Give a function that shows progress: a live line on a terminal, nothing in a log file."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    bar = BarColumn(bar_width=20)
    columns = (bar, TextColumn("{task.description}"), TextColumn("ETA"), TimeRemainingColumn())
    with RichProgress(*columns, console=console, transient=True) as display:
        task = display.add_task("starting the workers", total=None)
        yield lambda progress: display.update(
            task,
            description=_rates(progress),
            completed=progress.read_bytes,
            total=progress.total_bytes,
        )


def _rates(progress: Progress) -> str:
    seconds = max(progress.seconds, 1e-9)
    return (
        f"file {progress.files_begun:,}/{progress.files_total:,}  "
        f"{progress.documents:,} documents  {progress.text_bytes / 1e6 / seconds:.1f} MB/s  "
        f"{progress.tokens / seconds:,.0f} tokens/s"
    )


def summary(options: PreprocessOptions, manifests: dict[str, Manifest], progress: Progress) -> str:
    """Return the lines printed at the end; MB are 10^6 bytes of UTF-8 text."""
    lines: list[str] = []
    for prefix, manifest in manifests.items():
        files = manifest.files
        lines += [
            f"wrote {prefix}.bin, .idx, .json",
            f"  documents  {files.documents:,} ({files.empty_documents:,} empty) "
            f"from {len(manifest.sources):,} files",
            f"  tokens     {files.tokens:,} ({files.bin_bytes:,} bytes)",
        ]
    missing = progress.documents - sum(m.files.documents for m in manifests.values())
    if missing and progress.documents:
        lines.append(f"left out {missing:,} empty documents whose shard would hold no token")
    if progress.seconds:
        lines.append(
            f"text {progress.text_bytes / 1e6:,.1f} MB in {progress.seconds:.1f} s: "
            f"{progress.text_bytes / 1e6 / progress.seconds:.1f} MB/s, "
            f"{progress.tokens / progress.seconds:,.0f} tokens/s"
        )
    if progress.replaced_surrogates:
        lines.append(f"replaced {progress.replaced_surrogates:,} lone surrogates by U+FFFD")
    if progress.skipped_bad_lines:
        lines.append(
            f"skipped {progress.skipped_bad_lines:,} bad lines, listed in "
            f"{options.quarantine_path}; the first of them:"
        )
        lines += [f"  {bad.path}:{bad.line}: {bad.problem}" for bad in progress.bad_lines]
    return "\n".join(lines) + "\n"
