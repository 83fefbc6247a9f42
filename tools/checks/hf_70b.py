"""Import and export in the shape of Llama 3 70B with random weights: peak memory and GB/s.

    python -m tools.checks.hf_70b --layers 4 --folder /big/disk
    python -m tools.checks.hf_70b --layers 80 --discard --folder /big/disk

Every layer and the vocabulary have the full width; --layers says how many layers there are of the
80, since memory does not depend on it and disk does: 2.1 GB a layer more 4.2 GB, three times
(source, checkpoint, export).  The source is made of random bits, imported and exported again by
processes of their own, and each exported file must have the SHA-256 of the source's.

--discard is for all 80 layers without 420 GB of disk: weights are generated when they are asked
for, and each finished file is deleted once its checksum is known.  Import and export then read
generated weights and not each other's files, so that the bits cannot be compared; everything else
is the same code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUND_BYTES = 128256 * 8192 * 2 + (1 << 30)  # the largest tensor, and 1 GiB
STEPS = ("source", "import", "export")


def main() -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch space; is emptied")
    parser.add_argument("--layers", type=int, default=4, help="of 80 (default: 4)")
    parser.add_argument("--discard", action="store_true", help="delete files once they are done")
    parser.add_argument("--out", type=Path, help="write the result into this JSON file")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        print(json.dumps(run_step(args.step, args.folder, args.layers, discard=args.discard)))
        return 0
    work = args.folder / "hf_70b"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    results: dict[str, Any] = {"layers": args.layers, "discard": args.discard}
    results["machine"] = f"{os.cpu_count()}-core {platform.machine()}"
    for step in STEPS:
        if not (args.discard and step == "source"):
            results[step] = _in_process(step, work, args)
            print(step, results[step], flush=True)
    results["same_bits"] = None if args.discard else _same_files(work)
    peaks = [results[step]["peak_bytes"] for step in ("import", "export")]
    results |= {"bound_bytes": BOUND_BYTES, "within_bound": max(peaks) <= BOUND_BYTES}
    shutil.rmtree(work)
    print(json.dumps(results, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if results["within_bound"] and results["same_bits"] in (None, True) else 1


def _in_process(step: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tools.checks.hf_70b", "--step", step]
    command += ["--folder", str(work), "--layers", str(args.layers)]
    command += ["--discard"] if args.discard else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_step(step: str, work: Path, layers: int, *, discard: bool) -> dict[str, Any]:
    """One of the three steps in this process; its bytes, seconds and peak of resident memory."""
    from litespark.config.schema import ModelConfig
    from litespark.parallel.device import prepare_megatron
    from litespark.training.single import single_process

    prepare_megatron()
    values = {"preset": "llama3-70b", "num_layers": layers, "family": "llama"}
    model = ModelConfig.model_validate(values)
    if discard:
        _discard_finished_files()
    before = _peak_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    with single_process():
        num_bytes = {"source": _make, "import": _import, "export": _export}[step](
            work, model, discard
        )
    seconds = time.perf_counter() - started
    return {
        "num_bytes": num_bytes,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "gb_per_second": round(num_bytes / seconds / 1e9, 3),
        "gb_per_cpu_second": round(num_bytes / (time.process_time() - cpu) / 1e9, 3),
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before": before,
    }


def _make(work: Path, model: Any, discard: bool) -> int:
    """Write the source folder: random bits under the names and in the order of an export."""
    import torch

    from litespark.checkpoint.hf.folder import write_json
    from litespark.checkpoint.hf.registry import config_json
    from litespark.checkpoint.hf.shards import MAX_SHARD_BYTES, plan_files, write_file, write_index

    folder = work / "source"
    folder.mkdir()
    files = plan_files(_planned(model), torch.bfloat16, MAX_SHARD_BYTES)
    sums = {
        file.name: write_file(folder / file.name, file, torch.bfloat16, lambda count: None)
        for file in files
    }
    if len(files) > 1:
        write_index(folder, files, torch.bfloat16)
    write_json(folder / "config.json", config_json(model, "bfloat16", None, None))
    write_json(work / "sums.json", sums)
    return sum(math.prod(tensor.shape) * 2 for file in files for tensor in file.tensors)


def _import(work: Path, model: Any, discard: bool) -> int:
    import torch

    from litespark.checkpoint.hf.import_ import (
        Importing,
        WeightSource,
        import_hf,
        write_checkpoint,
    )
    from litespark.checkpoint.hf.registry import family_of_model

    if not discard:
        return import_hf(work / "source", work / "imported", Importing()).num_bytes

    def read(entry: Any, layer: int | None, start: int, out: Any) -> None:
        out.copy_(random_rows(len(out), tuple(out.shape[1:])))

    entries = family_of_model(model).entries(model)
    source = WeightSource(work, model, entries, torch.bfloat16, read)
    return write_checkpoint(source, work / "imported", Importing()).num_bytes


def _export(work: Path, model: Any, discard: bool) -> int:
    import torch

    from litespark.checkpoint.folder import find_checkpoint
    from litespark.checkpoint.hf.export import export_checkpoint, write_weights
    from litespark.checkpoint.hf.shards import MAX_SHARD_BYTES, plan_files
    from litespark.checkpoint.hf.staging import staged

    if not discard:
        return export_checkpoint(find_checkpoint(work / "imported"), work / "exported").num_bytes
    files = plan_files(_from_generated(model), torch.bfloat16, MAX_SHARD_BYTES)
    with staged(work / "exported", {"task": "export"}, resume=False) as staging:
        write_weights(staging, files, torch.bfloat16, lambda count: None)
    return sum(math.prod(tensor.shape) * 2 for file in files for tensor in file.tensors)


def random_rows(num_rows: int, row_shape: tuple[int, ...]) -> Any:
    """Random bits, bf16 [num_rows, ...]; most of them are numbers."""
    import numpy
    import torch

    count = num_rows * math.prod(row_shape)
    bits = numpy.random.Generator(numpy.random.SFC64()).integers(
        0, 1 << 63, size=-(-count // 4), dtype=numpy.int64
    )
    return torch.from_numpy(bits).view(torch.bfloat16)[:count].view(num_rows, *row_shape)


@dataclass(frozen=True)
class _RandomBlocks:
    shape: tuple[int, ...]

    def __call__(self) -> Iterable[Any]:
        row_bytes = math.prod(self.shape[1:]) * 2
        at_once = max(1, (32 << 20) // row_bytes)
        for start in range(0, self.shape[0], at_once):
            yield random_rows(min(at_once, self.shape[0] - start), self.shape[1:])


def _planned(model: Any) -> Iterable[Any]:
    from litespark.checkpoint.hf.shards import PlannedTensor

    for entry, layer in _stored(model):
        for name, shape in zip(entry.names(layer), entry.hf_shapes(model), strict=True):
            yield PlannedTensor(name, shape, _RandomBlocks(shape))


def _from_generated(model: Any) -> Iterable[Any]:
    """What an export reads, from a checkpoint of one piece a tensor that is made when asked for."""
    from litespark.checkpoint.hf.export import hf_tensors
    from litespark.checkpoint.hf.read import CheckpointReader

    class Generated(CheckpointReader):
        def __init__(self) -> None:
            pass

        def read(self, entry: Any, layer: int | None, start: int = 0, stop: Any = None) -> Any:
            rows, *rest = entry.stored_shape(model)
            return random_rows((rows if stop is None else stop) - start, tuple(rest))

        def pieces(self, entry: Any, num_rows: int) -> Iterable[tuple[int, Any]]:
            yield 0, self.read(entry, None, 0, num_rows)

        def tensors(self) -> Iterable[tuple[Any, int | None]]:
            return _stored(model)

    return hf_tensors(Generated(), model)


def _stored(model: Any) -> Iterable[tuple[Any, int | None]]:
    from litespark.checkpoint.hf.registry import family_of_model
    from litespark.checkpoint.hf.table import stored_tensors

    return stored_tensors(family_of_model(model).entries(model), model)


def _discard_finished_files() -> None:
    from litespark.checkpoint.hf import staging

    original = staging.Staging.record

    def record(self: Any, name: str, value: Any) -> None:
        original(self, name, value)
        for path in self.folder.rglob(name):
            os.truncate(path, 0)

    staging.Staging.record = record


def _same_files(work: Path) -> bool:
    expected = json.loads((work / "sums.json").read_text())
    files = json.loads((work / "exported" / "manifest.json").read_text())["files"]
    return all(files.get(name, {}).get("sha256") == value for name, value in expected.items())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
