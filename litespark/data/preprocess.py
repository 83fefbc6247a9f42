"""Text to an indexed shard, in parallel, in order, and all or nothing.

    this process:  files -> decompress -> blocks of lines  ...>  write .bin, .idx, manifest
    N workers:                              parse JSON -> tokenize -> ids as bytes

A block is about 1 MiB of lines.  At most a few blocks per worker are in flight, and results are
taken in the order the blocks were sent, so memory is bounded and the output is the same for every
N.  Workers return problems as values and never decide anything: the policy for bad lines is
applied here, in input order.  A worker that dies (killed for memory, say) breaks the pool, which
ends the job at once.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Literal

from litespark.data import workers
from litespark.data.indexed import IndexedWriter, bin_path, idx_path
from litespark.data.manifest import (
    Manifest,
    SourceRecord,
    TokenizerRecord,
    manifest_path,
    write_manifest,
)
from litespark.data.output import (
    check_output_name,
    disk_error,
    prepare_folder,
    refuse_existing,
    unusable_output,
)
from litespark.data.readers import BadLine, LineBlock, Source, find_sources, iterate_blocks
from litespark.data.tokenizers import Tokenizer, load_tokenizer
from litespark.errors import LitesparkError, UserError
from litespark.version import __version__

_BLOCKS_IN_FLIGHT_PER_WORKER = 3
_BAD_LINES_SHOWN = 5


@dataclass(frozen=True)
class PreprocessOptions:
    """What `litespark preprocess` is asked to do.

    Attributes:
        inputs: files, folders and globs.
        tokenizer: see `litespark.data.tokenizers.load_tokenizer`.
        output_prefix: the shard is `<output_prefix>_<json_key>_document`.
        json_key: the key of the text in each object.
        workers: tokenizing processes.
        append_eod: end each document that is not empty with the tokenizer's end-of-text id.
        on_error: what a line without a document does: end the job, or be counted and skipped.
        max_errors: most lines to skip before the job ends all the same.
        overwrite: replace an existing shard.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    json_key: str = "text"
    workers: int = 1
    append_eod: bool = True
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: int = 100
    overwrite: bool = False

    @property
    def shard_prefix(self) -> str:
        """The prefix of the files to write."""
        return f"{self.output_prefix}_{self.json_key}_document"


@dataclass
class Progress:
    """Running totals; text is counted in UTF-8 bytes, `bad_lines` holds the first few skipped."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    replaced_surrogates: int = 0
    skipped_bad_lines: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)
    files_begun: int = 0
    files_total: int = 0
    seconds: float = 0.0


def preprocess(
    options: PreprocessOptions, report: Callable[[Progress], None] | None = None
) -> Manifest:
    """Tokenize the inputs into one shard with its manifest; `report` is called after each block.

    It starts processes by spawning, so a script calls it under `if __name__ == "__main__":`.

    Raises:
        UserError: when an option, an input file or a line is wrong, or see `prepare_output`.
        LitesparkError: when a worker process dies or the disk refuses a write.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    _check_options(options, tokenizer)
    sources = find_sources(options.inputs)
    prepare_output(options)
    prefix = options.shard_prefix
    try:
        writer = IndexedWriter(prefix, tokenizer.vocab_size)
    except OSError as error:
        raise unusable_output(options.output_prefix, prefix, error) from error
    try:
        job = _Job(options, tokenizer, sources, writer, report)
        job.run()
        manifest = job.manifest()
        _publish(options, writer, manifest)
        return manifest
    except BrokenProcessPool as error:
        raise LitesparkError(
            f"{prefix}: a tokenizing process died (killed by the system for memory?). "
            "Nothing was written. Start again, with fewer --workers if memory is short."
        ) from error
    except OSError as error:  # inputs raise UserError, so what is left is the output
        raise disk_error(prefix, error) from error
    finally:
        writer.discard()


def prepare_output(options: PreprocessOptions) -> None:
    """Refuse an output that cannot be written or is there already, and make its folder.

    Raises:
        UserError: when the prefix or the key gives no file name, the folder cannot be made, or
            the output exists and is not to be replaced.
        LitesparkError: when the disk is full.
    """
    check_output_name(options.output_prefix)
    if not options.json_key or "/" in options.json_key or "\0" in options.json_key:
        raise UserError(
            f"--json-key {options.json_key!r}",
            "cannot be part of the output's file name",
            "Give a key without '/'.",
        )
    prepare_folder(options.output_prefix, options.shard_prefix)
    if not options.overwrite:
        refuse_existing(
            options.output_prefix, options.shard_prefix, ", or pass --overwrite to replace it"
        )


def _check_options(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}", "is below 1", "Give 1 or more.")
    if options.max_errors < 0:
        raise UserError(f"--max-errors {options.max_errors}", "is negative", "Give 0 or more.")
    if options.append_eod and tokenizer.eos_id is None:
        raise UserError(
            f"tokenizer {options.tokenizer}",
            "has no end-of-text token to append",
            "Name one as eos_token in tokenizer_config.json beside it, or pass --no-append-eod.",
        )


def _publish(options: PreprocessOptions, writer: IndexedWriter, manifest: Manifest) -> None:
    """Name the manifest, then `.bin`, then `.idx`: whoever sees the index sees all of it."""
    prefix = options.shard_prefix
    with suppress(FileNotFoundError):
        idx_path(prefix).unlink()  # when overwriting: no old index beside a new manifest
    write_manifest(prefix, manifest)
    try:
        writer.publish()
    except BaseException:
        for path in (manifest_path(prefix), idx_path(prefix), bin_path(prefix)):
            path.unlink(missing_ok=True)
        raise


class _Job:
    """One run: the stream of blocks, the pool, the totals."""

    def __init__(
        self,
        options: PreprocessOptions,
        tokenizer: Tokenizer,
        sources: list[Source],
        writer: IndexedWriter,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.sources = sources
        self.writer = writer
        self.report = report
        self.progress = Progress(files_total=len(sources))
        self._documents_of: dict[str, int] = {source.path: 0 for source in sources}
        self._sizes_bytes = {source.path: os.path.getsize(source.path) for source in sources}
        self._started = time.monotonic()

    def run(self) -> None:
        options = self.options
        settings = workers.Settings(
            tokenizer=str(self.tokenizer.path),
            json_key=options.json_key,
            eod_id=self.tokenizer.eos_id if options.append_eod else None,
            stop_at_bad_line=options.on_error == "stop",
        )
        # Spawned, not forked: tokenizer libraries and progress bars own threads, and a forked
        # copy of a lock held by one of them would hang the child.
        pool = ProcessPoolExecutor(
            options.workers,
            mp_context=get_context("spawn"),
            initializer=workers.initialize,
            initargs=(settings,),
        )
        try:
            for block, result in _in_order(
                pool, self._blocks(), options.workers * _BLOCKS_IN_FLIGHT_PER_WORKER
            ):
                self._take(block, result)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if self.writer.tokens == 0:
            raise UserError(
                f"--input {' '.join(options.inputs)}",
                f"gave {self.progress.documents} documents and no token",
                "Name inputs with text in them.",
            )

    def _blocks(self) -> Iterator[LineBlock]:
        for number, source in enumerate(self.sources, start=1):
            self.progress.files_begun = number
            yield from iterate_blocks(source)

    def _take(self, block: LineBlock, result: workers.TokenizedBlock) -> None:
        import numpy as np

        progress = self.progress
        for line, problem in result.bad_lines:
            self._bad_line(BadLine(block.source.path, line, problem))
        tokens = np.frombuffer(result.tokens, dtype=self.writer.dtype)
        lengths = np.frombuffer(result.lengths, dtype=np.int32)
        self.writer.add_documents(tokens, lengths)
        self._documents_of[block.source.path] += len(lengths)
        progress.documents += len(lengths)
        progress.tokens += len(tokens)
        progress.text_bytes += result.text_bytes
        progress.replaced_surrogates += result.replaced_surrogates
        progress.seconds = time.monotonic() - self._started
        if self.report is not None:
            self.report(progress)

    def _bad_line(self, bad: BadLine) -> None:
        if self.options.on_error == "stop":
            raise bad.as_error()
        progress = self.progress
        progress.skipped_bad_lines += 1
        if len(progress.bad_lines) < _BAD_LINES_SHOWN:
            progress.bad_lines.append(bad)
        if progress.skipped_bad_lines > self.options.max_errors:
            first = progress.bad_lines[0]
            raise UserError(
                f"{bad.path}:{bad.line}",
                f"{bad.problem}; this is bad line number {progress.skipped_bad_lines}, more than "
                f"--max-errors {self.options.max_errors} (the first was {first.path}:{first.line})",
                "Look at the data, or raise --max-errors.",
            )

    def manifest(self) -> Manifest:
        files = self.writer.seal()
        return Manifest(
            tokenizer=TokenizerRecord(
                identity=self.tokenizer.identity,
                name=self.tokenizer.path.name,
                vocab_size=self.tokenizer.vocab_size,
                eos_id=self.tokenizer.eos_id,
            ),
            append_eod=self.options.append_eod,
            json_key=self.options.json_key,
            sources=tuple(
                SourceRecord(s.name, self._sizes_bytes[s.path], self._documents_of[s.path])
                for s in self.sources
            ),
            files=files,
            skipped_bad_lines=self.progress.skipped_bad_lines,
            replaced_surrogates=self.progress.replaced_surrogates,
            litespark_version=__version__,
        )


def _in_order(
    pool: ProcessPoolExecutor, blocks: Iterable[LineBlock], max_in_flight: int
) -> Iterator[tuple[LineBlock, workers.TokenizedBlock]]:
    """Yield each block with its result, in order, never having more than `max_in_flight` out."""
    in_flight: deque[tuple[LineBlock, Future[workers.TokenizedBlock]]] = deque()
    for block in blocks:
        in_flight.append((block, pool.submit(workers.tokenize_block, block)))
        if len(in_flight) >= max_in_flight:
            waiting, future = in_flight.popleft()
            yield waiting, future.result()
    for waiting, future in in_flight:
        yield waiting, future.result()
