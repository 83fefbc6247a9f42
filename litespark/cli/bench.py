"""`litespark bench`: measure a training step, and a peer's beside it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from litespark.cli.arguments import add_command
from litespark.config.load import load_config
from litespark.config.presets import PRESETS
from litespark.config.schema import RunConfig
from litespark.config.validate import check_config
from litespark.errors import ExitCode, GuardError, LitesparkError, UserError

Record = dict[str, Any]

_DESCRIPTION = """\
Measure a training step of a model: forward and backward over the accumulated micro-batches,
clipping, optimizer; the code is that of `litespark train`.  Prints tokens/s, TFLOP/s, MFU, energy,
peak memory, and where the time goes, kernel by kernel.  Tokens are random unless --data is given.

MFU counts causal attention over the GPU's dense BF16 peak, whatever the precision.  Figures are
medians over the timed steps; several processes (torchrun) are measured together, per GPU.
"""

_EPILOG = """\
examples:
  litespark bench --model paper-3b --precision fp8 --recipe delayed --json result.json
  litespark bench --model paper-3b --precision fp8 --compare peer
  litespark bench --model tiny --precision fp32 --backend reference --micro-batch 2 --steps 3
  torchrun --nproc-per-node 8 -m litespark bench --model paper-30b parallel.tensor=8

exit codes: 0 done, 2 the configuration or the data is wrong, 4 the loss was not finite, 1 anything
else, also when the peer failed and only the own figures are there.
"""

_DEFAULT_SEQUENCE_LENGTH = 4096
# What every measurement has in common; the options are put on top as `section.key=value`.
_BASE = """\
run: {name: bench, output_dir: not-written}
model: {preset: paper-3b}
data: {blend: [{prefix: random-tokens}], split: [100, 0, 0], sequence_length: 1}
batch: {micro: 1, global: 1}
optimizer: {lr: 1e-4}
schedule: {kind: constant}
training: {steps: 1}
logging: {tensorboard: false}
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "bench",
        summary="measure a training step, and a peer's beside it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--model", default="paper-3b", metavar="PRESET", help="shape (default: paper-3b)")
    add("--precision", metavar="MODE", help="fp8, bf16 or fp32 (default: the configuration's)")
    add("--recipe", help="fp8 scaling: delayed, tensorwise (current) or blockwise")
    add("--backend", help="auto, reference, triton or te (default: the configuration's)")
    add(
        "--seq-length",
        type=_count,
        metavar="N",
        help=f"tokens of a sample (default: {_DEFAULT_SEQUENCE_LENGTH}, or the model's longest)",
    )
    add("--micro-batch", type=_count, default=4, metavar="N", help="samples at once (default: 4)")
    add("--accumulate", type=_count, default=8, metavar="N", help="micro-batches (default: 8)")
    add("--warmup", type=_count, default=3, metavar="N", help="steps before (default: 3)")
    add("--steps", type=_count, default=10, metavar="N", help="timed steps (default: 10)")
    add("--data", metavar="PREFIX", help="read this shard (without .bin) and no random tokens")
    add("--json", type=Path, metavar="FILE", help="write all figures and the dearest 25 kernels")
    add(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one more step under the profiler, for the breakdown (default: yes; needs a GPU)",
    )
    add(
        "--check-energy",
        action="store_true",
        help="poll the GPU's power beside its energy counter and compare: give it a minute",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure the rates of this GPU for `litespark plan --gpu FILE`, and nothing else: "
        "some minutes",
    )
    add("--verbose", action="store_true", help="print the dearest 25 kernels and every message")
    add(
        "--compare",
        choices=["peer"],
        help="run Megatron-Core with Transformer Engine first, in a process of its own, with the "
        "best configuration known for this precision on one H100",
    )
    add(
        "--peer-pythonpath",
        metavar="DIR[:DIR]",
        help="folders with the peer's packages, found before the installed ones: megatron-core, "
        "and Transformer Engine where it is not to be seen by Litespark",
    )
    add(
        "--peer-micro-batch",
        type=_count,
        metavar="N",
        help="the peer's samples at once (default: 4 in fp8, 2 in bf16)",
    )
    add(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="any value of the configuration, e.g. parallel.tensor=2",
    )
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    if args.calibrate is not None:
        from litespark.cli.bench_calibrate import calibrate

        calibrate(args.calibrate)
        return ExitCode.DONE
    from litespark.cli.bench_peer import check_peer, run_peer
    from litespark.cli.bench_table import kernel_table, result_table
    from litespark.parallel.environment import world_size_from_environment
    from litespark.utils.files import write_text_atomically

    world_size = world_size_from_environment() or 1
    try:
        config = build_config(args, world_size)
        check_config(config, world_size)
        _check_output(args.json)
        if args.compare:
            check_peer(args, config, world_size)
    except UserError as error:
        error.on_every_rank = True  # every process of a launcher reads the same words
        raise
    started = _process_started()
    peer, peer_error = None, None
    if args.compare:
        began = time.time()
        try:
            peer = run_peer(args, config)
        except LitesparkError as error:  # our own figures are worth having without it
            peer_error = error
        started += time.time() - began  # the cold start is our own
    result = _measure(args, config, started)
    if os.environ.get("RANK", "0") != "0":
        return ExitCode.DONE  # the first rank speaks
    if peer is not None:
        result["peer"] = peer
        result["ratio_to_peer"] = result["tokens_per_second"] / peer["tokens_per_second"]
    sys.stdout.write(result_table(result))
    if args.verbose and result["breakdown"] is not None:
        sys.stdout.write(kernel_table(result["breakdown"]))
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(result, indent=1) + "\n")
    if peer_error is not None:
        raise peer_error
    if result["loss"] is None:
        raise GuardError("the loss was not finite: the figures are not those of a training step")
    return ExitCode.DONE


def build_config(args: argparse.Namespace, world_size: int) -> RunConfig:
    """The run configuration that the options describe; `section.key=value` has the last word.

    Raises:
        UserError: an option or an override is wrong, in the words of the configuration's keys.
    """
    longest = PRESETS.get(args.model, {}).get("max_sequence_length", _DEFAULT_SEQUENCE_LENGTH)
    options = {
        "model.preset": args.model,
        "precision.mode": args.precision,
        "precision.recipe": args.recipe,
        "model.backend": args.backend,
        "data.sequence_length": args.seq_length or min(_DEFAULT_SEQUENCE_LENGTH, longest),
        "data.blend": [{"prefix": args.data}] if args.data else None,
        "batch.micro": args.micro_batch,
        "training.steps": args.warmup + args.steps + 1,  # one under the profiler
    }
    # JSON is YAML, so the words are read back as they are meant.
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value]
    with tempfile.TemporaryDirectory(prefix="litespark-bench-") as folder:
        base = Path(folder) / "bench.yaml"
        base.write_text(_BASE, encoding="utf-8")
        config = load_config(base, [*overrides, *args.overrides])
        samples_at_once = config.batch.micro * max(1, config.data_parallel_size(world_size))
        overrides.append(f"batch.global={samples_at_once * args.accumulate}")
        return load_config(base, [*overrides, *args.overrides])


def _check_output(path: Path | None) -> None:
    """A mistake in the path must not cost the measurement."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--json {path}", "lies in no folder that exists", "Make the folder first.")


def _process_started() -> float:
    """When this process began, in seconds since the epoch: imports belong to a cold start."""
    import psutil

    return psutil.Process().create_time()


def _measure(args: argparse.Namespace, config: RunConfig, started: float) -> Record:
    if not args.verbose:
        logging.getLogger("litespark").setLevel(logging.WARNING)
    from litespark.parallel.device import prepare_megatron

    prepare_megatron()  # before anything imports megatron-core
    from litespark.training.benchmark import BenchmarkOptions, run_benchmark

    options = BenchmarkOptions(
        warmup=args.warmup,
        steps=args.steps,
        profile=args.profile,
        reads_data=args.data is not None,
        process_started=started,
        checks_energy=args.check_energy,
    )
    return run_benchmark(config, options)
