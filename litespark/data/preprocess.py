"""Text to indexed shards, in parallel, in order, all or nothing, and restartable.

    this process:  files -> decompress -> blocks of lines  ...>  append ids, commit, publish
    N workers:                              parse JSON -> tokenize -> ids as bytes

For many workers other processes read (`litespark.data.reading`).  A block is about 1 MiB of
lines.  At most a few blocks per worker are in flight, and results are taken in the order the blocks
were sent, so memory is bounded and the output is the same for every N.  Workers return problems as
values and never decide anything: the policy for bad lines is applied in `litespark.data.job`, in
input order.  A worker that dies (killed for memory, say) breaks the pool, which ends the job at
once.

Unfinished work lies in a folder beside the output (`litespark.data.work`), from which a job that
was killed goes on; the final names appear when all is done.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from litespark.data import reading, workers
from litespark.data.documents import parsed_lines
from litespark.data.engine import cut_at_line_ends, probe_texts, reason_against
from litespark.data.in_order import IN_FLIGHT_PER_WORKER, results_in_order
from litespark.data.job import Job
from litespark.data.manifest import Manifest
from litespark.data.options import PreprocessOptions, Progress
from litespark.data.output import (
    check_output_name,
    disk_error,
    prepare_folder,
    unusable_output,
)
from litespark.data.readers import Source, find_sources, iterate_blocks
from litespark.data.reading import (
    Block,
    Inputs,
    Reading,
    ReadingElsewhere,
    ReadingHere,
    can_read_elsewhere,
)
from litespark.data.tokenizers import Tokenizer, load_tokenizer
from litespark.data.work import WorkFolder
from litespark.errors import LitesparkError, UserError
from litespark.utils.processes import prepare_worker

__all__ = ["PreprocessOptions", "Progress", "preprocess"]

# What the fast engine must agree with the reference on, besides the edge strings.
_PROBED_DOCUMENTS = 64
_PROBED_CHARACTERS = 1 << 12  # of each
_COUNTED_BLOCKS = 4  # an input of fewer is small; reading many would keep the workers from starting
_MODEL_NAME = "model"
_READER_FROM_WORKERS = 4  # fewer never wait for this process, which reads as well as it writes
_WORKERS_PER_READER = 12

_InFlight = list[tuple[Block, Future[workers.TokenizedBlock]]]


def preprocess(
    options: PreprocessOptions,
    report: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Manifest]:
    """Tokenize the inputs; return the manifest of each shard written, by the shard's prefix.

    It starts processes by spawning, so a script calls it under `if __name__ == "__main__":`.

    Args:
        options: what to do.
        report: called with the running totals after each block.
        say: called with lines that the user should read now, such as why the job will be slow.

    Raises:
        UserError: when an option, an input file or a line is wrong, or the output cannot be made.
        LitesparkError: when a worker process dies or the disk refuses a write.
    """
    say = say or (lambda line: None)
    _check_options(options)
    sources = find_sources(options.inputs)
    # The workers start while this process reads the tokenizer.
    num_workers = _useful_workers(options, sources)
    with ExitStack() as stack:
        pools = _Pools(
            stack.enter_context(_started_pool(num_workers, workers.warm_up)),
            [
                stack.enter_context(_started_pool(1, reading.warm_up))
                for _ in range(_num_readers(num_workers, len(sources)))
            ],
        )
        return _preprocess(options, sources, pools, report, say)


class _Pools(NamedTuple):
    """The processes of a job: those that tokenize, and each that reads, if this one does not."""

    tokenizing: ProcessPoolExecutor
    reading: list[ProcessPoolExecutor]


def _preprocess(
    options: PreprocessOptions,
    sources: list[Source],
    pools: _Pools,
    report: Callable[[Progress], None] | None,
    say: Callable[[str], None],
) -> dict[str, Manifest]:
    tokenizer = load_tokenizer(options.tokenizer)
    _check_tokenizer(options, tokenizer)
    prefix = options.output_prefix
    prepare_output(options)
    try:
        work = WorkFolder(prefix)
    except OSError as error:
        raise unusable_output(prefix, prefix, error) from error
    job: Job | None = None
    try:
        job = Job(options, tokenizer, sources, work, report)
        job.begin(say)
        if not job.is_sealed:
            with _opened(pools, job.inputs(), options.workers) as text:
                _tokenize(job, tokenizer, pools.tokenizing, text, work.path, say)
            for pool in (pools.tokenizing, *pools.reading):
                pool.shutdown(wait=False)  # the processes end while the shards are sealed
            job.seal()
        manifests = job.publish()
        work.mark_done()
        return manifests
    except BrokenProcessPool as error:
        raise LitesparkError(
            f"{prefix}: a reading or tokenizing process died (killed by the system for memory?). "
            f"Nothing was written under the final names.{_how_to_go_on(job)}"
        ) from error
    except OSError as error:  # inputs raise UserError, so what is left is the output
        raise disk_error(prefix, error, _how_to_go_on(job)) from error
    finally:
        if job is not None:
            job.close()
        work.release(keep=job is not None and job.is_resumable)


def _how_to_go_on(job: Job | None) -> str:
    if job is None or not job.is_resumable:
        return " Start again when that is mended."
    return " Start again with --resume to go on where it stopped."


def prepare_output(options: PreprocessOptions) -> None:
    """Refuse names that could not be written, before hours of work, and make the folder.

    Raises:
        UserError: when the prefix or a key gives no file name, or the folder cannot be made.
        LitesparkError: when the disk is full.
    """
    check_output_name(options.output_prefix)
    for key in options.json_keys:
        if not key or "/" in key or "\0" in key:
            raise UserError(
                f"--json-key {key!r}",
                "cannot be part of the output's file name",
                "Give a key without '/'.",
            )
        prepare_folder(options.output_prefix, options.shard_prefix(key))


def _check_options(options: PreprocessOptions) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}", "is below 1", "Give 1 or more.")
    if options.max_errors < 0:
        raise UserError(f"--max-errors {options.max_errors}", "is negative", "Give 0 or more.")
    repeated = {key for key in options.json_keys if options.json_keys.count(key) > 1}
    if repeated:
        raise UserError(
            f"--json-key {' '.join(options.json_keys)}",
            f"{', '.join(sorted(repeated))} is named more than once",
            "Name each key once; each gives one shard.",
        )


def _check_tokenizer(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    _check_names(options, tokenizer)
    for wanted, token_id, what, option in (
        (options.append_eod, tokenizer.eos_id, "end-of-text token to append", "--no-append-eod"),
        (options.prepend_bos, tokenizer.bos_id, "begin-of-text token", "--no-prepend-bos"),
    ):
        if wanted and token_id is None:
            name = "eos_token" if what.startswith("end") else "bos_token"
            raise UserError(
                f"tokenizer {options.tokenizer}",
                f"has no {what}",
                f"Name one as {name} in tokenizer_config.json beside it, or pass {option}.",
            )


def _check_names(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    """Refuse at the start what the manifest, which is UTF-8, could not hold at the end."""
    keys = (("--json-key", key) for key in options.json_keys)
    split = ("--split-by", options.split_by or "")
    for option, value in (("--tokenizer", tokenizer.path.name), split, *keys):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{option} {value!r}", "is not UTF-8, so the manifest cannot hold it", "Rename it."
            ) from error


def _useful_workers(options: PreprocessOptions, sources: list[Source]) -> int:
    """A small input gets a process a block: each reads the tokenizer, which takes longer."""
    few = min(options.workers, _COUNTED_BLOCKS)
    blocks = chain.from_iterable(iterate_blocks(s, columns=options.columns) for s in sources)
    try:
        found = sum(1 for _ in islice(blocks, few))
    except UserError:  # told when the job comes to it
        return options.workers
    return options.workers if found == few else max(1, found)


def _num_readers(num_workers: int, num_sources: int) -> int:
    """How many processes are to read; none when this one is to."""
    if num_workers < _READER_FROM_WORKERS or not can_read_elsewhere():
        return 0
    return min(num_sources, 1 + (num_workers - 1) // _WORKERS_PER_READER)


@contextmanager
def _started_pool(num_workers: int, warm_up: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    # Spawned, not forked: tokenizer libraries and progress bars own threads, and a forked
    # copy of a lock held by one of them would hang the child.
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=prepare_worker
    )
    # A child inherits the mask: it would tell of Ctrl-C before `prepare_worker` makes it deaf.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(num_workers):
            pool.submit(warm_up)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _opened(pools: _Pools, inputs: Inputs, num_workers: int) -> Iterator[Reading]:
    if not pools.reading:
        yield ReadingHere(inputs)
        return
    text = ReadingElsewhere(pools.reading, inputs, num_workers * IN_FLIGHT_PER_WORKER)
    try:
        yield text
    finally:
        text.close()


def _tokenize(
    job: Job,
    tokenizer: Tokenizer,
    pool: ProcessPoolExecutor,
    text: Reading,
    work: Path,
    say: Callable[[str], None],
) -> None:
    """Run all blocks that are left through the workers."""
    options, blocks = job.options, job.blocks(text)
    model_path = work / _MODEL_NAME
    settings = _settings(options, tokenizer, model_path)
    in_flight: _InFlight = []
    reason: str | None = "gigatoken does not know this kind of tokenizer"
    plain_json = tokenizer.plain_json()
    if plain_json is not None:
        # By a file: what does not fit in a pipe would be handed to one process after the other.
        cut_at_line_ends(plain_json).save(model_path)
        texts = probe_texts(tokenizer, _first_documents(options, job.sources))
        tried = pool.submit(workers.try_engine, settings, texts)
        # Blocks follow at once; what became of them is dropped where the engine is not right.
        for block in islice(blocks, options.workers * IN_FLIGHT_PER_WORKER):
            in_flight.append((block, pool.submit(workers.tokenize_block, settings, block)))
        # Reading the reference takes as long as loading the engine, which goes on meanwhile.
        expected = [tokenizer.encode(probe) for probe in texts]
        ids = tried.result()
        reason = ids if isinstance(ids, str) else reason_against(texts, ids, expected)
    if reason is not None:
        say(f"note: {reason}; the reference tokenizer is used, which takes several times longer")
        settings = replace(settings, model_path=None)
        # One that still runs would leave its ids where those of the next try will be.
        wait([future for _, future in in_flight if not future.cancel()])
        blocks = chain([block for block, _ in in_flight], blocks)
        in_flight = []
    tokenize = partial(workers.tokenize_block, settings)
    for block, result in results_in_order(pool, tokenize, blocks, options.workers, in_flight):
        job.take(block, result)
        text.release(block)


def _settings(
    options: PreprocessOptions, tokenizer: Tokenizer, model_path: Path
) -> workers.Settings:
    return workers.Settings(
        tokenizer=str(tokenizer.path),
        model_path=str(model_path),
        vocab_size=tokenizer.vocab_size,
        json_keys=options.json_keys,
        split_by=options.split_by,
        bos_id=tokenizer.bos_id if options.prepend_bos else None,
        eod_id=tokenizer.eos_id if options.append_eod else None,
        stop_at_bad_line=options.on_error == "stop",
    )


def _first_documents(options: PreprocessOptions, sources: list[Source]) -> Iterator[str]:
    """Yield the beginnings of the first documents; what is wrong with a line is told later."""
    left = _PROBED_DOCUMENTS
    for source in sources[:_PROBED_DOCUMENTS]:
        for block in iterate_blocks(source, columns=options.columns):
            for _, parsed in parsed_lines(block, options.json_keys):
                if isinstance(parsed, str):
                    continue
                yield from (text[:_PROBED_CHARACTERS] for text in parsed.texts)
                left -= 1
                if left == 0:
                    return
            break  # the first block of a file is enough
