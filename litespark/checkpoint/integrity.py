"""Which bytes a checkpoint consists of, and whether they are still those.

File systems, disks and copies flip bits, and neither torch nor safetensors would notice: a damaged
tensor loads and trains on.  While a file is written, its XXH3-128 grows along with it, from memory
and not from what comes back from the disk.  The last file of a checkpoint, `complete.json`, lists
every other file with its size and checksum, and carries a checksum of that list and of the step,
so a checkpoint is whole only if this list is there, is intact, and agrees with every file.

XXH3-128 is no cryptographic hash: it finds damage, and not the change of someone who adapts the
list as well.  That nothing in a checkpoint can run code is another module's matter
(`megatron_patches/safe_checkpoint_metadata.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import xxhash

from litespark.errors import UserError
from litespark.utils.files import write_text_atomically

MARKER = "complete.json"
ALGORITHM = "xxh3_128"
FORMAT_VERSION = 1
_BLOCK_BYTES = 8 << 20
_THREADS = 2  # a rank; there are as many ranks as GPUs beside it


@dataclass(frozen=True)
class FileRecord:
    """Size and XXH3-128 (32 hexadecimal digits) of one file."""

    size_bytes: int
    checksum: str


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was written; the message names the files."""

    def __init__(self, checkpoint: Path, faults: Iterable[str]) -> None:
        self.checkpoint, self.faults = checkpoint, tuple(faults)
        super().__init__(
            str(checkpoint),
            f"is damaged: {describe(self.faults)}",
            "Take another checkpoint.",
        )


def describe(faults: Iterable[str]) -> str:
    """The first faults in one line."""
    faults = list(faults)
    more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


class ChecksumFile:
    """A new file whose checksum grows with what is written; what torch.save writes into.

    Raises:
        OSError: the file exists, the folder does not, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by `__exit__`
        self._digest = xxhash.xxh3_128()
        self._size_bytes = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append bytes or any buffer; returns how many bytes that were."""
        size_bytes = memoryview(data).nbytes
        try:
            self._file.write(data)
        except OSError as error:
            self._error = error
            raise
        self._digest.update(data)
        self._size_bytes += size_bytes
        return size_bytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size_bytes

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def force(self) -> FileRecord:
        """Force the file to the disk; its record."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(self._size_bytes, self._digest.hexdigest())

    def __enter__(self) -> ChecksumFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._error is None:
            self._file.close()
            return
        with suppress(OSError):
            self._file.close()
        raise self._error from None  # torch.save makes a RuntimeError of it that says nothing


def write_file(path: Path, content: bytes) -> FileRecord:
    """Write a small file and force it to the disk.

    Raises:
        OSError: it exists, or the disk is full.
    """
    with ChecksumFile(path) as file:
        file.write(content)
        return file.force()


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as it is on disk, in constant memory.

    Raises:
        OSError: it cannot be read.
    """
    digest, size_bytes = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return FileRecord(size_bytes, digest.hexdigest())


def write_marker(folder: Path, step: int, files: dict[str, FileRecord]) -> None:
    """Write the list of all files, last of all.

    Raises:
        OSError: the disk is full.
    """
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "algorithm": ALGORITHM,
        "step": step,
        "files": {name: asdict(files[name]) for name in sorted(files)},
    }
    content["checksum"] = _checksum(content)
    write_text_atomically(folder / MARKER, json.dumps(content, indent=1) + "\n")


def read_marker(checkpoint: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint by their path in it.

    Raises:
        DamagedCheckpoint: the list is missing, altered, of another checkpoint, or names a file
            outside.
    """
    path = checkpoint / MARKER
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop("checksum")
        if stated != _checksum(content):
            raise ValueError("its own checksum differs")
        if (content["format_version"], content["algorithm"]) != (FORMAT_VERSION, ALGORITHM):
            raise ValueError("it is of another version")
        name = checkpoint.resolve().name
        if name.startswith("step_") and name != f"step_{content['step']:09d}":
            raise ValueError(f"it is that of step {content['step']}")
        records = {name: FileRecord(**record) for name, record in content["files"].items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(checkpoint, [f"{path} is missing"]) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(checkpoint, [f"{path} is not what was written ({error})"]) from None
    for name in records:
        if not is_inside(name):
            raise DamagedCheckpoint(checkpoint, [f"{path} names a file outside: {name!r}"])
    return records


def is_inside(name: str) -> bool:
    """Whether a path read from a file stays in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def quick_faults(checkpoint: Path) -> list[str]:
    """What can be seen without reading the tensors: files that are missing or of another size."""
    try:
        records = read_marker(checkpoint)
    except DamagedCheckpoint as error:
        return list(error.faults)
    return [
        fault
        for name, record in records.items()
        if (fault := _size_fault(checkpoint / name, record))
    ]


def first_intact(candidates: Sequence[Path]) -> Path | None:
    """The first that looks whole without its tensors being read; None without candidates.

    Raises:
        UserError: there are candidates, and none is whole.
    """
    faults: dict[Path, list[str]] = {}
    for checkpoint in candidates:
        faults[checkpoint] = quick_faults(checkpoint)
        if not faults[checkpoint]:
            return checkpoint
    return refuse_if_none_is_whole(faults)


def refuse_if_none_is_whole(faults: dict[Path, list[str]]) -> None:
    """Refuse to go on when each of these is damaged; without any there is nothing to say.

    Raises:
        UserError: there are some.
    """
    if not faults:
        return
    if len(faults) == 1:
        raise DamagedCheckpoint(*next(iter(faults.items())))
    said = "; ".join(describe(each[:1]) for each in faults.values())
    raise UserError(
        str(next(iter(faults)).parent),
        f"holds {len(faults)} checkpoints and each is damaged: {said}",
        "Restore one from a copy, or start anew in another run.output_dir.",
    )


def share_faults(checkpoint: Path, share: int = 0, num_shares: int = 1) -> list[str]:
    """The faults in one of `num_shares` parts of about equal size; all bytes of it are read."""
    try:
        records = read_marker(checkpoint)
    except DamagedCheckpoint as error:
        return list(error.faults)
    sums = [0] * num_shares
    mine = []
    for name in sorted(records, key=lambda name: (-records[name].size_bytes, name)):
        lightest = sums.index(min(sums))
        sums[lightest] += records[name].size_bytes
        if lightest == share:
            mine.append(name)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _fault(checkpoint / name, records[name]), mine)
        return [fault for fault in found if fault]


def check_whole(checkpoint: Path) -> None:
    """Read all of a checkpoint in this process.

    Raises:
        DamagedCheckpoint: it is not what was written.
    """
    faults = share_faults(checkpoint)
    if faults:
        raise DamagedCheckpoint(checkpoint, faults)


def _size_fault(path: Path, record: FileRecord) -> str | None:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        return f"{path} is missing" if not path.exists() else f"{path}: {error.strerror}"
    if size_bytes != record.size_bytes:
        return f"{path} has {size_bytes} bytes of {record.size_bytes}"
    return None


def _fault(path: Path, record: FileRecord) -> str | None:
    fault = _size_fault(path, record)
    if fault:
        return fault
    try:
        found = record_of(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if found != record:
        return f"{path} has other content: {ALGORITHM} {found.checksum}, not {record.checksum}"
    return None


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
