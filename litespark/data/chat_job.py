"""Conversations and preference pairs to indexed shards: `litespark preprocess --task sft|dpo`.

    this process:  files -> decompress -> blocks of lines  ...>  append ids and answers, publish
    N workers:                      parse JSON -> messages -> template -> ids, answers

Two shards are written.  `P_sft_document` holds the token ids, one document a conversation; it is
Megatron's format and `data verify` reads it as any other.  `P_sft_answers` holds, for each of these
documents, where its answers stand: start, stop, start, stop, ... in tokens, int32.  That is some
ten bytes a turn where a mask would be one a token.  Of preferences (`P_dpo_...`) documents 2k and
2k + 1 are the prompt of pair k with its chosen answer and with its rejected one.

Every row is counted: what is kept, what is left out and for which reason, what is cut.  Rows that
are left out are listed with file and line in `P_quarantine.txt`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from litespark.data import chat_workers
from litespark.data.chat_encoding import EncodedChat
from litespark.data.chat_shards import answers_prefix
from litespark.data.chat_template import Turns
from litespark.data.documents import BadLine
from litespark.data.in_order import results_in_order
from litespark.data.indexed import IndexedWriter
from litespark.data.manifest import (
    ChatRecord,
    Manifest,
    SourceRecord,
    TokenizerRecord,
    manifest_path,
    write_manifest,
)
from litespark.data.output import check_output_name, disk_error, prepare_folder, refuse_existing
from litespark.data.readers import LineBlock, Meter, Source, find_sources, iterate_blocks
from litespark.data.storage import version_of
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import LitesparkError, UserError
from litespark.utils.files import atomic_write
from litespark.version import __version__

_PLACES = 2**31 - 1  # places of tokens, as the "vocabulary" of the shard of answers: int32
OVER_LONG = "over-long"


@dataclass(frozen=True)
class ChatOptions:
    """What is asked for.

    Attributes:
        task: conversations (sft) or preference pairs (dpo).
        inputs, tokenizer, output_prefix, workers, on_error, max_errors, overwrite: as in
            `PreprocessOptions`.
        chat_template: file of the template; None takes the tokenizer's.
        turns: train on all answers of a conversation or on its last one.
        max_tokens: longest conversation, or pair of answers with their prompts; None for no limit.
        over_long: what happens to longer ones: left out, or (sft) cut; both are counted.
    """

    task: Literal["sft", "dpo"]
    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    chat_template: str | None = None
    turns: Turns = "all"
    max_tokens: int | None = None
    over_long: Literal["drop", "truncate"] = "drop"
    workers: int = 1
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: int = 100
    overwrite: bool = False

    @property
    def shard_prefix(self) -> str:
        """The prefix of the shard of tokens."""
        return f"{self.output_prefix}_{self.task}_document"

    @property
    def quarantine_path(self) -> Path:
        """Where the rows that are left out are listed, when there are any."""
        return Path(f"{self.output_prefix}_quarantine.txt")


@dataclass
class ChatCounts:
    """Running totals; `left_out` counts rows by reason, `listed` names each."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    truncated: int = 0
    longest_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    @property
    def malformed(self) -> int:
        """Rows left out for what they are, not for their length."""
        return sum(count for reason, count in self.left_out.items() if reason != OVER_LONG)


def preprocess_chats(
    options: ChatOptions, report: Callable[[ChatCounts], None] | None = None
) -> tuple[Manifest, ChatCounts]:
    """Encode the inputs; the manifest of the shard written, and what became of the rows.

    With more than one worker it starts processes by spawning, so a script calls it under
    `if __name__ == "__main__":`.

    Raises:
        UserError: an option, an input or a row is wrong, or nothing is left to train on.
        LitesparkError: a worker died or the disk refuses a write.
    """
    _check_options(options)
    settings = chat_workers.Settings(
        options.task,
        options.tokenizer,
        options.chat_template,
        options.turns,
        options.max_tokens,
        options.over_long,
    )
    template = chat_workers.load(settings).template  # a mistake in it is told before any work
    tokenizer = load_tokenizer(options.tokenizer)
    sources = find_sources(options.inputs)
    check_output_name(options.output_prefix)
    for prefix in (options.shard_prefix, answers_prefix(options.shard_prefix)):
        prepare_folder(options.output_prefix, prefix)
        if not options.overwrite:
            refuse_existing(
                options.output_prefix, prefix, ", or pass --overwrite to replace the output"
            )
    job = _Job(options, sources, report)
    try:
        with ExitStack() as stack:
            tokens, answers = (
                stack.enter_context(_Unpublished(prefix, vocab_size))
                for prefix, vocab_size in (
                    (options.shard_prefix, tokenizer.vocab_size),
                    (answers_prefix(options.shard_prefix), _PLACES),
                )
            )
            job.run(settings, tokens, answers)
            record = TokenizerRecord(
                tokenizer.identity, tokenizer.path.name, tokenizer.vocab_size, tokenizer.eos_id
            )
            manifest = job.publish(record, template.sha256, tokens, answers)
    except BrokenProcessPool as error:
        raise LitesparkError(
            f"{options.output_prefix}: an encoding process died (killed by the system for memory?)."
            " Nothing was written under the final names."
        ) from error
    except OSError as error:  # inputs raise UserError, so what is left is the output
        raise disk_error(options.shard_prefix, error) from error
    return manifest, job.counts


class _Unpublished(IndexedWriter):
    """A writer whose block leaves nothing but what was published in it."""

    def __exit__(self, *_: object) -> None:
        self.discard()


def _check_options(options: ChatOptions) -> None:
    for name, value, least in (
        ("--workers", options.workers, 1),
        ("--max-errors", options.max_errors, 0),
        ("--max-length", options.max_tokens, 2),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} {value}", f"is below {least}", f"Give {least} or more.")
    if options.over_long == "truncate" and options.max_tokens is None:
        raise UserError(
            "--over-long truncate", "has no effect without --max-length", "Give both or neither."
        )
    if options.over_long == "truncate" and options.task == "dpo":
        raise UserError(
            "--over-long truncate with --task dpo",
            "would compare answers of which one has lost its end",
            "Leave it out: pairs that are too long are left out, and counted.",
        )
    if options.turns == "last" and options.task == "dpo":
        raise UserError(
            "--turns last with --task dpo",
            "has no effect: what is compared is all that follows the prompt",
            "Leave it out.",
        )


class _Job:
    """The rows in order: policy, counts, and the two writers."""

    def __init__(
        self,
        options: ChatOptions,
        sources: list[Source],
        report: Callable[[ChatCounts], None] | None,
    ) -> None:
        self.options = options
        self.sources = sources
        self.report = report
        self.counts = ChatCounts()
        self.meter = Meter()
        self.digests: dict[str, str] = {}
        self.kept_of: Counter[str] = Counter()

    def run(
        self, settings: chat_workers.Settings, tokens: IndexedWriter, answers: IndexedWriter
    ) -> None:
        """Encode all rows.

        Raises:
            UserError: a row is bad and the job is to stop, or too many are; or none is good.
        """
        for block, outcomes in _encoded(settings, self._blocks(), self.options.workers):
            for line, outcome in outcomes:
                self.counts.rows += 1
                if isinstance(outcome, chat_workers.LeftOut):
                    self._leave_out(block.source.path, line, outcome)
                    continue
                self.counts.kept += 1
                self.kept_of[block.source.path] += len(outcome.chats)
                self.counts.truncated += outcome.is_truncated
                for chat in outcome.chats:
                    self._add(chat, tokens, answers)
                length = sum(len(chat.ids) for chat in outcome.chats)
                self.counts.longest_tokens = max(self.counts.longest_tokens, length)
            if self.report is not None:
                self.report(self.counts)
        if self.counts.kept == 0:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.counts.left_out.items())
            raise UserError(
                f"--input {' '.join(self.options.inputs)}",
                f"gave {self.counts.rows} rows and none to train on ({reasons or 'no rows'})",
                "Look at the first rows: do they have the keys that --help names?",
            )

    def _blocks(self) -> Iterator[LineBlock]:
        for source in self.sources:
            if source.is_text:
                raise UserError(
                    source.path, "is plain text, and no rows of conversations", "Name .jsonl files."
                )
            yield from iterate_blocks(source, meter=self.meter)
            self.digests[source.path] = self.meter.sha256()

    def _add(self, chat: EncodedChat, tokens: IndexedWriter, answers: IndexedWriter) -> None:
        tokens.add_document(chat.ids)
        answers.add_document([place for span in chat.answers for place in span])
        self.counts.tokens += len(chat.ids)
        self.counts.answer_tokens += chat.answer_tokens

    def _leave_out(self, path: str, line: int, row: chat_workers.LeftOut) -> None:
        counts = self.counts
        if row.reason != OVER_LONG and self.options.on_error == "stop":
            raise BadLine(path, line, f"{row.reason}: {row.problem}").as_error()
        counts.left_out[row.reason] += 1
        counts.listed.append(f"{path}:{line}: {row.reason}: {row.problem}")
        if counts.malformed > self.options.max_errors:
            raise UserError(
                f"{path}:{line}",
                f"{row.reason}: {row.problem}; this is malformed row number {counts.malformed}, "
                f"more than --max-errors {self.options.max_errors} (the first left out was "
                f"{counts.listed[0]})",
                "Look at the data, or raise --max-errors.",
            )

    def publish(
        self,
        tokenizer: TokenizerRecord,
        template_sha256: str,
        tokens: IndexedWriter,
        answers: IndexedWriter,
    ) -> Manifest:
        """Give everything its name: the list of rows left out, answers, tokens, the manifest."""
        options, counts = self.options, self.counts
        files, answer_files = tokens.seal(), answers.seal()
        manifest = Manifest(
            tokenizer=tokenizer,
            append_eod=False,
            json_key=options.task,
            sources=tuple(
                SourceRecord(
                    name=source.name,
                    size_bytes=version_of(source.path).size_bytes,
                    documents=self.kept_of[source.path],
                    sha256=self.digests[source.path],
                )
                for source in self.sources
            ),
            files=files,
            skipped_bad_lines=counts.malformed,
            replaced_surrogates=0,
            litespark_version=__version__,
            chats=ChatRecord(
                task=options.task,
                template_sha256=template_sha256,
                turns=options.turns,
                max_tokens=options.max_tokens,
                rows=counts.rows,
                kept=counts.kept,
                truncated=counts.truncated,
                left_out=dict(sorted(counts.left_out.items())),
                longest_tokens=counts.longest_tokens,
                answer_tokens=counts.answer_tokens,
                answers=answer_files,
            ),
        )
        if counts.listed:
            with atomic_write(options.quarantine_path) as file:
                file.write(
                    "".join(f"{line}\n" for line in counts.listed).encode("utf-8", "replace")
                )
        elif options.overwrite:
            options.quarantine_path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # of an earlier shard: it must not meet these files
            manifest_path(options.shard_prefix).unlink()
        answers.publish()
        tokens.publish()
        write_manifest(options.shard_prefix, manifest)
        return manifest


_Encoded = Iterator[tuple[LineBlock, list[tuple[int, chat_workers.Outcome]]]]


def _encoded(
    settings: chat_workers.Settings, blocks: Iterator[LineBlock], workers: int
) -> _Encoded:
    """Each block with what became of its rows, in order."""
    if workers == 1:
        chat_workers.initialize(settings)
        for block in blocks:
            yield block, chat_workers.encode_block(block)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=chat_workers.initialize_process,
        initargs=(settings,),
    )
    try:
        yield from results_in_order(pool, chat_workers.encode_block, blocks, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
