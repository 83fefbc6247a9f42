"""How many tokens a second one process's loader hands out, beside what a GPU takes.

Reads `--prefix`, or writes a shard of random ids with lognormal document lengths first.  The steps
are taken as fast as the loader gives them, so its thread is never idle and the rate is that of its
work: finding the documents of each sample, copying their tokens, making tensors.  CPU-seconds are
those of the whole process, all threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from litespark.data.blend import open_blend
from litespark.data.indexed import IndexedWriter
from litespark.data.loader import BatchLoader
from litespark.data.sample_index import IndexCache

H100_TOKENS_PER_SECOND = 58_000  # paper-3b in FP8; see the results of this folder
DEMANDED_RATIO = 20


def write_shard(prefix: Path, tokens: int) -> None:
    """Write documents of about a thousand ids, most of them shorter."""
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, 32000) as writer:
        while writer.tokens < tokens:
            lengths = np.maximum(1, generator.lognormal(6.2, 1.2, 2000)).astype(np.int32)
            ids = generator.integers(0, 32000, int(lengths.sum()), dtype=np.uint16)
            writer.add_documents(ids, lengths)


def measure(prefixes: list[str], args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Take `args.steps` steps and return the rates."""
    samples = open_blend(
        [(prefix, 1.0) for prefix in prefixes],
        (1.0, 0.0, 0.0),
        "train",
        args.sequence_length,
        1,
        IndexCache(folder),
    )
    if samples is None:
        raise ValueError("the training share is 1")
    loader = BatchLoader(samples, args.micro_batch, args.global_batch, 0, 1)
    loader.next_step()  # builds or maps the sample index, starts the thread
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(args.steps):
        loader.next_step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loader.close()
    tokens = args.steps * args.global_batch * args.sequence_length
    return {
        "tokens": tokens,
        "wall_seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "tokens_per_second": round(tokens / wall),
        "tokens_per_cpu_second": round(tokens / cpu),
        "times_one_h100": round(tokens / wall / H100_TOKENS_PER_SECOND, 1),
    }


def main() -> None:
    """Measure a few times and print a line for each, and whether the demand is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", nargs="+", help="shards to read, in equal shares")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of the shard it writes")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prefixes = args.prefix
        if prefixes is None:
            write_shard(Path(folder) / "random", args.tokens)
            prefixes = [str(Path(folder) / "random")]
        rates = []
        for _ in range(args.repeats):
            result = measure(prefixes, args, f"{folder}/index")
            rates.append(result["tokens_per_second"])
            print(json.dumps(result))
        demanded = H100_TOKENS_PER_SECOND * DEMANDED_RATIO
        median = sorted(rates)[len(rates) // 2]
        print(f"median {median:,.0f} tokens/s; demanded {demanded:,} ({DEMANDED_RATIO} x one H100)")


if __name__ == "__main__":
    main()
