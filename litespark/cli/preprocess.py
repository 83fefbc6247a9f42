"""`litespark preprocess`: text files to an indexed shard."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_command
from litespark.utils.processes import available_cores

if TYPE_CHECKING:  # the help must not wait for numpy
    from litespark.data.manifest import Manifest
    from litespark.data.preprocess import PreprocessOptions, Progress

_DESCRIPTION = """\
Turn text into an indexed shard that `litespark train` (and Megatron-LM) reads.

Input is JSON lines, one object a line with the text under --json-key: files ending in .jsonl,
.jsonl.zst or .jsonl.gz, folders of them (searched recursively, in sorted order), or quoted globs.
SlimPajama's tree works as it is.

Output is P_text_document.bin (token ids), .idx (where each document is) and .json (the manifest:
counts, checksums, the tokenizer's hash, the sources).  They appear whole when the job ends, or
not at all.  Documents keep the order of the input, and the bytes are the same for every number of
workers.

Text is data: "</s>" inside a document is tokenized as text and never becomes a control token.
"""

_EPILOG = """\
examples:
  litespark preprocess --input corpus.jsonl --tokenizer llama2/ --output-prefix data/corpus
  litespark preprocess --input SlimPajama/train/chunk1 --tokenizer llama2/tokenizer.model \\
      --output-prefix data/chunk1 --workers 32 --on-error skip

exit codes: 0 done, 2 the input or an option is wrong (the message names the file and line, or
why the output's folder cannot be used), 1 anything else (disk full, a process killed); whatever the
end, no half-written output stays.
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
        help="a folder with tokenizer.json or tokenizer.model, or such a file; local files only",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in each object; part of the output's name (default: text)",
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
        help="files, folders and globs, taken in this order",
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
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a line that is no JSON object with a string under the key: stop the job, naming file "
        "and line (default), or skip and count it",
    )
    parser.add_argument(
        "--max-errors",
        type=int,
        default=100,
        metavar="N",
        help="with --on-error skip: stop all the same after more than N bad lines (default: 100)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output if it is there already"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code.

    Raises:
        LitesparkError: see `litespark.data.preprocess.preprocess`.
    """
    from litespark.data.preprocess import PreprocessOptions

    options = PreprocessOptions(
        inputs=tuple(args.input),
        tokenizer=args.tokenizer,
        output_prefix=args.output_prefix,
        json_key=args.json_key,
        workers=args.workers,
        append_eod=args.append_eod,
        on_error=args.on_error,
        max_errors=args.max_errors,
        overwrite=args.overwrite,
    )
    return run_options(options)


def run_options(options: PreprocessOptions) -> int:
    """Preprocess with a progress line on a terminal and a summary at the end; return 0.

    Raises:
        LitesparkError: see `litespark.data.preprocess.preprocess`.
    """
    from litespark.data.preprocess import Progress, preprocess

    # A scheduler's SIGTERM unwinds like an error, so that the temporary files go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    last = Progress()

    with _progress_line() as show:

        def report(progress: Progress) -> None:
            nonlocal last
            last = progress
            show(progress)

        manifest = preprocess(options, report)
    sys.stdout.write(summary(options, manifest, last))
    return 0


@contextmanager
def _progress_line() -> Iterator[Callable[[Progress], None]]:
    """Give a function that shows progress: a live line on a terminal, nothing in a log file."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True) as display:
        task = display.add_task("starting the workers", total=None)
        yield lambda progress: display.update(task, description=_rates(progress))


def _rates(progress: Progress) -> str:
    seconds = max(progress.seconds, 1e-9)
    return (
        f"file {progress.files_begun:,}/{progress.files_total:,}  "
        f"{progress.documents:,} documents  {progress.text_bytes / 1e6 / seconds:.1f} MB/s  "
        f"{progress.tokens / seconds:,.0f} tokens/s"
    )


def summary(options: PreprocessOptions, manifest: Manifest, progress: Progress) -> str:
    """Return the lines printed at the end; MB are 10^6 bytes of UTF-8 text."""
    files = manifest.files
    lines = [
        f"wrote {options.shard_prefix}.bin, .idx, .json",
        f"  documents  {files.documents:,} ({files.empty_documents:,} empty) "
        f"from {len(manifest.sources):,} files",
        f"  tokens     {files.tokens:,} ({files.bin_bytes:,} bytes)",
        f"  text       {progress.text_bytes / 1e6:,.1f} MB in {progress.seconds:.1f} s: "
        f"{progress.text_bytes / 1e6 / max(progress.seconds, 1e-9):.1f} MB/s, "
        f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s",
    ]
    if progress.replaced_surrogates:
        lines.append(f"  replaced   {progress.replaced_surrogates:,} lone surrogates by U+FFFD")
    if progress.skipped_bad_lines:
        lines.append(f"  skipped    {progress.skipped_bad_lines:,} bad lines, the first of them:")
        lines += [f"    {bad.path}:{bad.line}: {bad.problem}" for bad in progress.bad_lines]
    return "\n".join(lines) + "\n"
