"""One preprocessing job: which block comes next, what becomes of its result, and how far it is.

The job is a state and four steps.  `begin` takes up the journal of an earlier run or starts anew,
`take` adds a block's documents to their shards and commits every few seconds, `seal` completes the
files under their working names, `publish` renames them.  All policy is here: a bad line ends the
job, or is listed in the quarantine file and counted against a limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from litespark.data import storage, workers
from litespark.data.documents import BadLine
from litespark.data.manifest import (
    Manifest,
    SourceRecord,
    TokenizerRecord,
    manifest_text,
    read_manifest,
)
from litespark.data.options import PreprocessOptions, Progress
from litespark.data.output import prepare_folder, refuse_existing
from litespark.data.readers import BLOCK_BYTES, Source
from litespark.data.reading import Block, Inputs, Reading, SharedBytes
from litespark.data.tokenizers import Tokenizer
from litespark.data.work import AppendedFile, ShardWork, WorkFolder, publish
from litespark.errors import UserError
from litespark.utils.files import rename_durably, write_text_atomically
from litespark.version import __version__

COMMIT_SECONDS = 10.0  # what a kill costs at most; a commit is an fsync of each open shard
_JOURNAL_FORMAT = 1
_BAD_LINES_SHOWN = 5
_MAX_SUBSETS = 256  # each keeps two files open
_QUARANTINE_NAME = "quarantine.txt"
# Of `Progress`, what the journal keeps.
_COUNTS = ("documents", "tokens", "text_bytes", "replaced_surrogates", "skipped_bad_lines")


class Job:
    """One run; see the module's text.

    Attributes:
        is_resumable: whether a later run could go on from what is on disk.
        is_sealed: whether all that is left is to give the files their names.
    """

    def __init__(
        self,
        options: PreprocessOptions,
        tokenizer: Tokenizer,
        sources: list[Source],
        work: WorkFolder,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self.options = options
        self.sources = sources
        self.is_resumable = False
        self.is_sealed = False
        self._work = work
        self._report = report
        self._tokenizer_record = TokenizerRecord(
            identity=tokenizer.identity,
            name=tokenizer.path.name,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        )
        self._versions = [source.version or storage.version_of(source.path) for source in sources]
        self._number_of = {source.path: number for number, source in enumerate(sources)}
        self._shards: dict[str, ShardWork] = {}
        self._digests: dict[int, str] = {}
        self._read_bytes = 0
        self._noted_sources = 0  # how many files the journal has in full
        self._source, self._blocks_done = 0, 0  # the place in the input that comes next
        self._quarantine: AppendedFile | None = None
        self._quarantine_bytes = 0
        self._sealed_names: dict[str, str] = {}
        self.progress = Progress(
            files_total=len(sources),
            total_bytes=sum(version.size_bytes for version in self._versions),
        )
        self._started = self._last_commit = time.monotonic()

    def begin(self, say: Callable[[str], None]) -> None:
        """Take up the unfinished work that --resume finds, or start anew.

        Raises:
            UserError: when the output exists, or the job is not the one that was begun.
            OSError: when the disk is full.
        """
        if not self.options.resume:
            self._refuse_existing()
            if self._work.start(self._description()):
                say("note: the unfinished work of an earlier run was removed (no --resume)")
            return
        lines = self._work.resume(self._description())
        if lines:
            self._restore(lines)
            say(f"note: going on after {self.progress.resumed_documents:,} documents")
        if not self.is_sealed:
            self._refuse_existing()

    def _description(self) -> dict[str, Any]:
        """What must be the same in a run that goes on; the number of workers need not be."""
        options = self.options
        return {
            "litespark_version": __version__,
            "journal_format": _JOURNAL_FORMAT,
            "block_bytes": BLOCK_BYTES,
            "tokenizer_sha256": self._tokenizer_record.identity,
            "json_key": list(options.json_keys),
            "split_by": options.split_by,
            "append_eod": options.append_eod,
            "prepend_bos": options.prepend_bos,
            "sources": [
                [source.path, version.size_bytes, version.change]
                for source, version in zip(self.sources, self._versions, strict=True)
            ],
        }

    def _refuse_existing(self) -> None:
        if not self.options.overwrite:
            for key in self.options.json_keys:
                self._refuse_shard(self.options.shard_prefix(key))

    def _refuse_shard(self, prefix: str) -> None:
        other_way = ", or pass --overwrite to replace it"
        refuse_existing(self.options.output_prefix, prefix, other_way)

    def _restore(self, lines: list[dict[str, Any]]) -> None:
        last = lines[-1]
        self.is_resumable = True
        self.is_sealed = last["kind"] == "sealed"
        progress = self.progress
        for name in _COUNTS:
            setattr(progress, name, last["counts"][name])
        progress.resumed_documents = progress.documents
        if self.is_sealed:
            self._sealed_names = last["names"]
            return
        self._source, self._blocks_done = last["source"], last["blocks"]
        for name, state in last["shards"].items():
            size = self._tokenizer_record.vocab_size
            self._shards[name] = ShardWork(self._work.path, name, size, state)
        for line in lines:
            if line["kind"] == "source":
                self._digests[line["source"]] = line["sha256"]
                self._set_documents_of(line["source"], line["documents"])
        self._noted_sources = self._source
        self._set_documents_of(self._source, last["documents"])
        self._quarantine_bytes = last["quarantine_bytes"]
        progress.bad_lines = [BadLine(*bad) for bad in last["bad_lines"]]

    def _set_documents_of(self, source: int, documents: dict[str, int]) -> None:
        for name, count in documents.items():
            self._shards[name].documents_of[source] = count

    def inputs(self) -> Inputs:
        """Return what is left to be read."""
        done = frozenset(number for number in self._digests if number < self._source)
        return Inputs(
            self.sources, self.options.columns, done, self._source, self._blocks_done, BLOCK_BYTES
        )

    def blocks(self, reading: Reading) -> Iterator[Block]:
        """Yield the blocks that are left, in order.

        Args:
            reading: of `inputs`.

        Raises:
            UserError: see `litespark.data.readers.iterate_blocks`.
            BrokenProcessPool: when another process read, and died.
        """
        passed = self.inputs().done_sources
        passed_bytes = sum(self._versions[number].size_bytes for number in passed)
        for read in reading:
            self._read_bytes = passed_bytes + read.read_bytes
            self.progress.files_begun = read.number + 1
            if read.block is None:
                self._digests[read.number] = read.sha256
            else:
                yield read.block

    def take(self, block: Block, result: workers.TokenizedBlock) -> None:
        """Add what became of a block, in the order of `blocks`.

        Raises:
            UserError: when a line is bad and the job is to stop, or too many are.
            OSError: when the disk is full.
        """
        for line, problem in result.bad_lines:
            self._bad_line(BadLine(block.source.path, line, problem))
        number = self._number_of[block.source.path]
        if number != self._source:
            self._source, self._blocks_done = number, 0
        progress = self.progress
        for group in result.groups:
            shard = self._shard(group.key, group.subset)
            ids = group.tokens
            data = ids.view() if isinstance(ids, SharedBytes) else ids
            tokens = np.frombuffer(data, dtype=shard.dtype)
            lengths = np.frombuffer(group.lengths, dtype=np.int32)
            shard.add(number, tokens, lengths)
            shard.replaced_surrogates += group.replaced_surrogates
            progress.documents += len(lengths)
            progress.tokens += len(tokens)
            progress.text_bytes += group.text_bytes
            progress.replaced_surrogates += group.replaced_surrogates
        self._blocks_done += 1
        progress.read_bytes = self._read_bytes
        progress.seconds = time.monotonic() - self._started
        if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self._commit()
        if self._report is not None:
            self._report(progress)

    def _shard(self, key: str, subset: str) -> ShardWork:
        prefix = self.options.shard_prefix(key, subset)
        name = os.path.basename(prefix)
        shard = self._shards.get(name)
        if shard is None:
            if len(self._shards) >= _MAX_SUBSETS * len(self.options.json_keys):
                raise UserError(
                    f"--split-by {self.options.split_by}",
                    f"gives more than {_MAX_SUBSETS} sub-sources",
                    "Name a value of which there are few.",
                )
            if subset:
                prepare_folder(self.options.output_prefix, prefix)
                if not self.options.overwrite:
                    self._refuse_shard(prefix)
            shard = ShardWork(self._work.path, name, self._tokenizer_record.vocab_size)
            shard.key, shard.subset = key, subset
            self._shards[name] = shard
        if (shard.key, shard.subset) != (key, subset):
            raise UserError(
                f"--split-by {self.options.split_by}",
                f"the sub-sources {shard.subset!r} and {subset!r} would both be written as {name}",
                "Preprocess the keys one at a time, under different prefixes.",
            )
        return shard

    def _bad_line(self, bad: BadLine) -> None:
        if self.options.on_error == "stop":
            raise bad.as_error()
        if self._quarantine is None:
            path = self._work.path / _QUARANTINE_NAME
            self._quarantine = AppendedFile(path, self._quarantine_bytes)
        self._quarantine.write(f"{bad.path}:{bad.line}: {bad.problem}\n".encode("utf-8", "replace"))
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

    def _commit(self) -> None:
        """Put everything taken so far on the disk, then say so in the journal."""
        if self._quarantine is not None:
            self._quarantine.sync()
            self._quarantine_bytes = self._quarantine.size_bytes
        states = {name: shard.state() for name, shard in self._shards.items()}
        for number in range(self._noted_sources, self._source):
            documents = self._documents_of(number)
            digest = self._digests[number]
            self._work.note("source", source=number, sha256=digest, documents=documents)
        self._noted_sources = self._source
        progress = self.progress
        self._work.commit(
            source=self._source,
            blocks=self._blocks_done,
            shards=states,
            documents=self._documents_of(self._source),
            quarantine_bytes=self._quarantine_bytes,
            bad_lines=[[bad.path, bad.line, bad.problem] for bad in progress.bad_lines],
            counts=self._counts(),
        )
        self.is_resumable = True
        self._last_commit = time.monotonic()

    def _documents_of(self, source: int) -> dict[str, int]:
        counts = {name: shard.documents_of.get(source, 0) for name, shard in self._shards.items()}
        return {name: count for name, count in counts.items() if count}

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.progress, name) for name in _COUNTS}

    def seal(self) -> None:
        """Complete every shard with tokens under its working name.

        Raises:
            UserError: when there is no token at all.
            OSError: when the disk is full.
        """
        if self.progress.tokens == 0:
            raise UserError(
                f"--input {' '.join(self.options.inputs)}",
                f"gave {self.progress.documents} documents and no token",
                "Name inputs with text in them.",
            )
        names: dict[str, str] = {}
        for name, shard in sorted(self._shards.items()):
            prefix = self.options.shard_prefix(shard.key, shard.subset)
            if shard.tokens == 0:
                continue
            names[name] = prefix
            text = manifest_text(self._manifest(shard))
            write_text_atomically(self._work.path / f"{name}.json", text)
        if self._quarantine is not None:
            self._quarantine.sync()
        self._work.commit("sealed", names=names, counts=self._counts())
        self._sealed_names, self.is_sealed, self.is_resumable = names, True, True

    def _manifest(self, shard: ShardWork) -> Manifest:
        options = self.options
        return Manifest(
            tokenizer=self._tokenizer_record,
            append_eod=options.append_eod,
            json_key=shard.key,
            sources=tuple(
                SourceRecord(
                    name=source.name,
                    size_bytes=self._versions[number].size_bytes,
                    documents=shard.documents_of.get(number, 0),
                    sha256=self._digests[number],
                )
                for number, source in enumerate(self.sources)
            ),
            files=shard.seal(),
            skipped_bad_lines=self.progress.skipped_bad_lines,
            replaced_surrogates=shard.replaced_surrogates,
            litespark_version=__version__,
            prepend_bos=options.prepend_bos,
            split_by=options.split_by,
            subset=shard.subset or None,
        )

    def publish(self) -> dict[str, Manifest]:
        """Give the sealed files their names; return each shard's manifest by its prefix.

        Raises:
            OSError: when a rename fails.
        """
        self.close()
        publish(self._work.path, list(self._sealed_names), self._sealed_names)
        listed = self._work.path / _QUARANTINE_NAME
        if self.progress.skipped_bad_lines and listed.exists():
            rename_durably(listed, self.options.quarantine_path)
        elif self.options.overwrite:
            self.options.quarantine_path.unlink(missing_ok=True)
        manifests = {prefix: read_manifest(prefix) for prefix in self._sealed_names.values()}
        return {prefix: found for prefix, found in manifests.items() if found is not None}

    def close(self) -> None:
        """Close the files of the work folder."""
        for shard in self._shards.values():
            shard.close()
        if self._quarantine is not None:
            self._quarantine.close()
