"""Unfinished work that survives a kill: a folder beside the output, and a journal in it.

    P.partial/  job.json        what the job was asked to do; a resumed job must be asked the same
                journal.jsonl   how far it is, one line a commit
                lock            held by the process at work, and let go by the system when it dies
                NAME.bin        token ids so far        } of each shard; NAME.lengths has one int32
                NAME.lengths    document lengths so far } a document
                quarantine.txt  the lines skipped so far

A commit forces the data to the disk first and then appends one line: sizes of the files, counts,
and the place in the input that comes next.  Whatever a kill left beyond the last commit is cut off
when the job resumes, so the bytes at the end are those of a job that was never disturbed.  A torn
last line of the journal is no commit.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from litespark.data.indexed import (
    ShardFiles,
    TokenArray,
    check_documents,
    token_type,
    write_index,
)
from litespark.errors import UserError
from litespark.utils.files import (
    HashingFile,
    digest_of_file,
    fsync_path,
    write_text_atomically,
)

_WRITE_BACK_BYTES = 32 << 20


class WorkFolder:
    """The folder `<output_prefix>.partial`, held by this process until `release` or its end.

    Raises:
        UserError: when another process is at work in it.
        OSError: when it cannot be made.
    """

    def __init__(self, output_prefix: str) -> None:
        self.path = Path(f"{output_prefix}.partial")
        self.path.mkdir(exist_ok=True)
        self._lock: IO[bytes] = open(self.path / "lock", "ab")  # noqa: SIM115 - held
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"--output-prefix {output_prefix}",
                "another process is writing this output",
                "Wait for it, or choose another prefix.",
            ) from None
        self._journal: IO[bytes] | None = None
        # Work found here is another run's until `start` removes it or `resume` takes it over.
        self._is_own = not self._journal_path.exists()
        self._is_done = False

    @property
    def _journal_path(self) -> Path:
        return self.path / "journal.jsonl"

    def start(self, job: dict[str, Any]) -> bool:
        """Begin anew with a job's description; return whether an earlier job's work was removed."""
        had_commits = bool(self._committed_lines())
        for path in self.path.iterdir():
            if path.name != "lock":
                path.unlink()
        self._is_own = True
        write_text_atomically(self.path / "job.json", json.dumps(job, indent=1) + "\n")
        self._journal = open(self._journal_path, "ab")  # noqa: SIM115 - closed by release
        return had_commits

    def resume(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the journal's lines up to the last commit; the job must be the same as then.

        The list is empty when the earlier job had committed nothing, or there was none.

        Raises:
            UserError: when the options or the inputs are not those of the unfinished work.
        """
        known = self._known_job()
        if known is None:
            self.start(job)
            return []
        for name in job:
            if known.get(name) != job[name]:
                raise UserError(
                    f"--resume: {self.path}",
                    f"the unfinished work there differs in {_difference(name, known, job)}",
                    "Restore it, or start over without --resume, which removes that work.",
                )
        lines = self._committed_lines()
        self._is_own = not lines
        self._journal = open(self._journal_path, "ab")  # noqa: SIM115 - closed by release
        return lines

    def _known_job(self) -> dict[str, Any] | None:
        try:
            value = json.loads((self.path / "job.json").read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _committed_lines(self) -> list[dict[str, Any]]:
        journal = self._journal_path
        lines: list[dict[str, Any]] = []
        committed, end_bytes, committed_bytes = 0, 0, 0
        with suppress(FileNotFoundError), open(journal, "rb") as file:
            for raw in file:
                end_bytes += len(raw)
                try:
                    lines.append(json.loads(raw))
                except ValueError:
                    break  # torn by the kill
                if not raw.endswith(b"\n"):
                    break
                if lines[-1]["kind"] != "source":
                    committed, committed_bytes = len(lines), end_bytes
        if journal.exists():
            os.truncate(journal, committed_bytes)
        return lines[:committed]

    def note(self, kind: str, **values: Any) -> None:
        """Append a line to the journal; it counts from the next commit on."""
        assert self._journal is not None
        self._journal.write(json.dumps({"kind": kind, **values}).encode() + b"\n")

    def commit(self, kind: str = "commit", **values: Any) -> None:
        """Append a line and force the journal to the disk.

        Raises:
            OSError: when the disk is full.
        """
        assert self._journal is not None
        self.note(kind, **values)
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def mark_done(self) -> None:
        """Say that nothing is left to resume; `release` then removes the folder."""
        self._is_done = True

    def release(self, *, keep: bool) -> None:
        """Let the folder go, and remove it unless its work is to be resumed or is not ours."""
        if self._lock.closed:
            return
        with suppress(OSError):
            if self._journal is not None:
                self._journal.close()
        if self._is_done or (self._is_own and not keep):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _difference(name: str, known: dict[str, Any], job: dict[str, Any]) -> str:
    old, new = known.get(name), job[name]
    if name != "sources" or not isinstance(old, list):
        return f"{name}: {old!r} then, {new!r} now"
    for before, after in zip(old, new, strict=False):
        if list(before) != list(after):
            return f"the input {after[0]}, changed, replaced or added since"
    return f"the inputs: {len(old)} files then, {len(new)} now"


class AppendedFile:
    """A file that grows, cut back to its committed size when a job resumes.

    Args:
        path: of the file.
        size_bytes: what is committed; the file must have at least as much.

    Raises:
        UserError: when the file is shorter than that.
        OSError: when it cannot be opened.
    """

    def __init__(self, path: Path, size_bytes: int = 0) -> None:
        self.path = path
        self.size_bytes = self._sent_bytes = size_bytes
        self._file: IO[bytes] = open(path, "r+b" if size_bytes else "w+b")  # noqa: SIM115 - held
        if os.fstat(self._file.fileno()).st_size < size_bytes:
            raise UserError(
                f"--resume: {path}", "is shorter than its journal says", "Start over without it."
            )
        self._file.truncate(size_bytes)
        self._file.seek(size_bytes)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: when the disk is full.
        """
        self._file.write(data)
        self.size_bytes += len(data)
        begin, size_bytes = self._sent_bytes, self.size_bytes - self._sent_bytes
        if size_bytes >= _WRITE_BACK_BYTES and hasattr(os, "posix_fadvise"):
            # Nobody reads it soon, so the system begins to write it now, and the fsync of the next
            # commit has little to wait for.
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), begin, size_bytes, os.POSIX_FADV_DONTNEED)
            self._sent_bytes = self.size_bytes

    def sync(self) -> None:
        """Force what was written to the disk.

        Raises:
            OSError: when the disk is full.
        """
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a full disk loses what is unwritten, and no commit has counted that."""
        with suppress(OSError):
            self._file.close()


class ShardWork:
    """One shard in the making: its tokens and lengths on disk, its counts here.

    Args:
        folder: the work folder's path.
        name: of the shard, the last part of its prefix.
        vocab_size: decides the stored type; ids at or above it are refused.
        state: what `state` gave at the last commit, for a resumed job.
    """

    def __init__(
        self, folder: Path, name: str, vocab_size: int, state: dict[str, Any] | None = None
    ) -> None:
        state = state or {}
        self.name = name
        self.folder = folder
        self.vocab_size = vocab_size
        self.dtype = np.dtype(token_type(vocab_size))
        self.key: str = state.get("key", "")
        self.subset: str = state.get("subset", "")
        self.documents: int = state.get("documents", 0)
        self.tokens: int = state.get("tokens", 0)
        self.replaced_surrogates: int = state.get("replaced_surrogates", 0)
        # Documents from each input file, by its number.
        self.documents_of: dict[int, int] = {}
        self._bin = AppendedFile(folder / f"{name}.bin", self.tokens * self.dtype.itemsize)
        self._lengths = AppendedFile(folder / f"{name}.lengths", self.documents * 4)
        self._digest = digest_of_file(self._bin.path)  # of a resumed job what is committed

    def add(self, source: int, tokens: TokenArray, lengths: TokenArray) -> None:
        """Append documents of input file number `source`: ids [sum of lengths] and each length.

        Raises:
            ValueError: when the lengths do not add up or an id is outside [0, vocab_size).
            OSError: when the disk is full.
        """
        check_documents(tokens, lengths, self.vocab_size)
        data = np.ascontiguousarray(tokens, self.dtype).view(np.uint8).data
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.write(lengths.astype(np.int32, copy=False).tobytes())
        self.tokens += tokens.size
        self.documents += len(lengths)
        self.documents_of[source] = self.documents_of.get(source, 0) + len(lengths)

    def state(self) -> dict[str, Any]:
        """Force the files to the disk and return what a resumed job needs to go on from here.

        Raises:
            OSError: when the disk is full.
        """
        self._bin.sync()
        self._lengths.sync()
        names = ("key", "subset", "documents", "tokens", "replaced_surrogates")
        return {name: getattr(self, name) for name in names}

    def seal(self) -> ShardFiles:
        """Write `NAME.idx` in the work folder and force it to the disk.

        Raises:
            OSError: when the disk is full.
        """
        self._bin.sync()
        self._lengths.sync()
        index_path = self.folder / f"{self.name}.idx"
        index_path.unlink(missing_ok=True)
        index = HashingFile(index_path)
        lengths = np.empty(0, np.int32)
        if self.documents:
            lengths = np.memmap(self._lengths.path, dtype=np.int32, mode="r")
        write_index(index, lengths, self.dtype)
        return ShardFiles(
            bin_bytes=self._bin.size_bytes,
            bin_sha256=self._digest.hexdigest(),
            idx_bytes=index.size_bytes,
            idx_sha256=index.close_durably(),
            documents=self.documents,
            empty_documents=int(np.count_nonzero(lengths == 0)),
            tokens=self.tokens,
        )

    def close(self) -> None:
        """Close the files."""
        self._bin.close()
        self._lengths.close()


def publish(folder: Path, names: list[str], prefix_of: dict[str, str]) -> None:
    """Give sealed shards their final names, manifest first and index last; may be repeated.

    Whoever sees an index sees all of its shard.  After a kill in the middle it goes on with what
    still has its working name.

    Raises:
        OSError: when a rename fails.
    """
    for name in names:
        final = {suffix: Path(f"{prefix_of[name]}{suffix}") for suffix in (".json", ".bin", ".idx")}
        if (folder / f"{name}.bin").exists():
            # An index of an earlier shard must not meet the new .bin, not even for a moment.
            final[".idx"].unlink(missing_ok=True)
        for suffix, path in final.items():
            working = folder / f"{name}{suffix}"
            if working.exists():
                os.replace(working, path)
        fsync_path(next(iter(final.values())).parent)
