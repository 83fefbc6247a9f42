"""Writes safetensors files of bounded size, one tensor after the other.

A model may be larger than this machine's memory, so at most one file's tensors are held at a time.
How many files there will be is known only at the end; until then they carry a number alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from litespark.utils.files import write_text_atomically

MAX_SHARD_BYTES = 4 << 30
INDEX_NAME = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors into files named as transformers expects them.

    Args:
        folder: where the files go; nobody else may be reading it yet.
        max_shard_bytes: size of one file's tensors; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.num_tensors = 0
        self.num_parameters = 0
        self.num_bytes = 0
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._names_by_shard: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, which must be contiguous and share no memory with another."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._write_pending()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.num_tensors += 1
        self.num_parameters += tensor.numel()
        self.num_bytes += tensor.nbytes

    def finish(self) -> list[str]:
        """Write what is left, give the files their names, and write the index if there are several.

        Returns the files' names.
        """
        self._write_pending()
        count = len(self._names_by_shard)
        if count == 1:
            files = ["model.safetensors"]
        else:
            files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for index, file in enumerate(files):
            self._numbered(index).rename(self._folder / file)
        if count > 1:
            weight_map = {
                name: file
                for file, names in zip(files, self._names_by_shard, strict=True)
                for name in names
            }
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            write_text_atomically(self._folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        return files

    def _numbered(self, index: int) -> Path:
        return self._folder / f"shard-{index:05d}"

    def _write_pending(self) -> None:
        path = self._numbered(len(self._names_by_shard))
        # transformers refuses a file that does not say which framework wrote it.
        save_file(self._pending, path, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; the folder obeys the umask.
        path.chmod(self._folder.stat().st_mode & 0o666)
        _force_to_disk(path)
        self._names_by_shard.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def _force_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
