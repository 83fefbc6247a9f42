"""How long the sample index of a large corpus takes to build and to open, and in how much memory.

Writes an `.idx` with lognormal document lengths and a sparse `.bin` of the size it asks for, then
measures in fresh processes: opening the shard and building the index of epoch 0, and the same again
with the index there (warm: in the page cache).  Each time ends with the first sample read.  Memory
is the growth of the process's peak (VmHWM), pages of the mapped files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from litespark.data.corpus import Corpus, PackedCorpus
from litespark.data.indexed import IndexedReader, bin_path, idx_path
from litespark.data.sample_index import IndexCache


def write_sparse_shard(prefix: Path, documents: int, tokens: int) -> int:
    """Write a shard of uint16 zeros, one sequence a document; return its tokens."""
    drawn = np.random.default_rng(0).lognormal(6.2, 1.2, documents)
    lengths = np.maximum(1, drawn * (tokens / drawn.sum())).astype("<i4")
    ends_bytes = np.cumsum(lengths, dtype="<i8") * 2
    with open(idx_path(prefix), "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(np.array([1], "<u8").tobytes() + bytes([8]))
        file.write(np.array([documents, documents + 1], "<u8").tobytes())
        file.write(lengths.tobytes())
        file.write((ends_bytes - 2 * lengths.astype("<i8")).tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with open(bin_path(prefix), "wb") as file:
        file.truncate(int(ends_bytes[-1]))
    return int(ends_bytes[-1]) // 2


def peak_mb() -> float:
    """Return this process's largest resident size so far; getrusage would give the parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def measure(prefix: str, folder: str, sequence_length: int, packing: str) -> None:
    """Open the corpus and its index in this process, and print what it took as JSON."""
    before_mb, started = peak_mb(), time.perf_counter()
    reader = IndexedReader(prefix)
    shard_seconds = time.perf_counter() - started
    shard_mb = peak_mb() - before_mb
    cache = IndexCache(folder)
    kind = PackedCorpus if packing == "whole" else Corpus
    corpus = kind(reader, (0, reader.documents), sequence_length, 1, cache)
    if isinstance(corpus, PackedCorpus):
        print(corpus.packing)
    request = corpus.order_request(0)
    found = cache.find(request)
    index_seconds = time.perf_counter() - started - shard_seconds
    corpus[0]
    total_seconds = time.perf_counter() - started
    result = {
        "how": found.how,
        "shard_seconds": round(shard_seconds, 2),
        "index_seconds": round(index_seconds, 2),
        "to_first_sample_seconds": round(total_seconds, 2),
        "shard_mb": round(shard_mb),
        "shard_and_index_mb": round(peak_mb() - before_mb),
    }
    print(json.dumps(result))


def main() -> None:
    """Make the shard, measure twice, print three lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=10_000_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--packing", choices=("stream", "whole"), default="stream")
    parser.add_argument("--folder", help="where to make it (default: a temporary folder)")
    parser.add_argument("--measure", nargs=2, metavar=("PREFIX", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        prefix, folder = args.measure
        measure(prefix, folder, args.sequence_length, args.packing)
        return
    if args.folder is not None:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prefix = Path(folder) / "synthetic"
        tokens = write_sparse_shard(prefix, args.documents, args.tokens)
        print(f"{args.documents:,} documents, {tokens:,} tokens")
        for _ in range(2):
            command = [sys.executable, __file__, "--measure", str(prefix), f"{folder}/index"]
            command += ["--sequence-length", str(args.sequence_length)]
            command += ["--packing", args.packing]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
