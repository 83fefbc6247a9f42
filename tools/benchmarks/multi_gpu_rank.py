"""One rank of `multi_gpu.py`: runs the cases of a file one after the other, in the same process.

    python tools/benchmarks/multi_gpu_rank.py CASES.json PROGRESS.jsonl

A process for several cases, because starting one costs more (imports, CUDA, compiled kernels) than
most of them.  The first rank appends a line to PROGRESS when a case begins and one with its result
when it ends.  A case that fails ends the process; so does one that leaves GPU memory behind, with
the exit code `NEEDS_FRESH_PROCESS`, and whoever started the ranks starts new ones for the rest.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# The folder of this script would be searched first, and its kernels.py taken for the package
# `kernels`.
sys.path[0] = str(Path(__file__).resolve().parents[2])

Record = dict[str, Any]
NEEDS_FRESH_PROCESS = 75
_LEFT_BYTES = 1 << 30


def main() -> int:
    """Run the cases; the exit code."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # asked for before a hang is ended
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    progress = Path(sys.argv[2])
    _import_what_takes_long(cases[0]["kind"])
    for number, case in enumerate(cases):
        os.environ["MASTER_PORT"] = str(case["port"])
        _tell(progress, {"event": "begin", "name": case["name"]})
        result = KINDS[case["kind"]](case["words"])
        _tell(progress, {"event": "end", "name": case["name"], "result": result})
        if number + 1 < len(cases) and _leaves_memory():
            return NEEDS_FRESH_PROCESS
    return 0


def _import_what_takes_long(kind: str) -> None:
    """Before the first case begins, so that its time is its own."""
    if kind == "peer":
        from tools.benchmarks.peer_mcore import provide_weight_gradient_products

        provide_weight_gradient_products()  # megatron-core looks for them when it is imported
        import megatron.core.models.gpt  # noqa: F401
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    elif kind != "kill":
        from litespark.parallel.device import prepare_megatron

        prepare_megatron()  # before anything imports megatron-core
        import litespark.training.hooks.checkpointing  # noqa: F401


def _tell(progress: Path, line: Record) -> None:
    if os.environ["RANK"] == "0":
        with open(progress, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"time": time.time()}) + "\n")


def _leaves_memory() -> bool:
    """Free what a case has left; whether much is left all the same.

    A model whose gradients are reduced during backward outlives its last name: DDP's hooks hold it
    by way of nodes of autograd, into which Python's collector cannot see.  So the memory of what is
    large is given back and the objects stay.
    """
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is None or not torch.cuda.is_available():
        return False
    for tensor in [tensor for found in gc.get_objects() for tensor in _large_tensors(found)]:
        if tensor.is_cuda:
            tensor.untyped_storage().resize_(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() > _LEFT_BYTES


def _large_tensors(found: Any) -> list[Any]:
    """The tensors of a left object, where it is of a kind that holds much."""
    kind = type(found).__name__
    if kind == "_ParamAndGradBuffer":
        held = [found.param_data, found.grad_data]
    elif kind in ("FusedAdamW", "FusedAdam"):
        masters = [master for group in found.param_groups for master in group["params"]]
        held = [*masters, *(value for state in found.state.values() for value in state.values())]
    elif kind in ("Fp8Matrix", "BlockScaledMatrix"):
        held = list(vars(found).values())
    else:
        return []
    return [value for value in held if hasattr(value, "untyped_storage")]


def _parsed(words: list[str]) -> tuple[argparse.Namespace, Any]:
    """The options of `litespark bench` and the configuration that they describe."""
    from litespark.cli.bench import add_parser, build_config

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", *words])
    return args, build_config(args, int(os.environ["WORLD_SIZE"]))


def bench(words: list[str]) -> Record:
    """`litespark bench`."""
    args, config = _parsed(words)
    from litespark.training.benchmark import BenchmarkOptions, run_benchmark

    options = BenchmarkOptions(args.warmup, args.steps, args.profile, False, time.time())
    return run_benchmark(config, options)


def losses(words: list[str]) -> Record:
    """Loss and gradient norm of every step, on samples that do not depend on the layout."""
    _, config = _parsed(words)
    from litespark.parallel.groups import stop_process_group
    from litespark.training.setup import batch_loader, build_run, start_processes
    from litespark.training.step import mean_loss, train_step
    from tools.benchmarks.learnable import LearnableSamples

    run = build_run(config, start_processes(config))
    if run.reads_tokens:
        samples = LearnableSamples(config.model.vocab_size, config.data.sequence_length)
        run.train_batches = batch_loader(run, samples)
    history = []
    while run.step < run.total_steps:
        outcome = train_step(run)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
    run.close()
    stop_process_group()
    return {"losses": [loss for loss, _ in history], "grad_norms": [norm for _, norm in history]}


def checkpoint(words: list[str]) -> Record:
    """Two saves in the background: what training waits, what the disk takes, steps meanwhile."""
    folder = Path(os.environ["LITESPARK_BENCH_SCRATCH"]) / "checkpoints"
    args, config = _parsed([*words, f"run.output_dir={folder}", "checkpoint.keep_last=1"])
    from litespark.parallel.groups import stop_process_group
    from litespark.training.benchmark import RandomBatches
    from litespark.training.hooks.checkpointing import Checkpointing
    from litespark.training.setup import build_run, start_processes
    from litespark.training.step import train_step

    run = build_run(config, start_processes(config))
    folder.mkdir(parents=True, exist_ok=True)
    run.train_batches = RandomBatches(run)  # type: ignore[assignment] - all that a step asks for
    wait = run.process.device.synchronize

    hook, saves = Checkpointing(), []

    def timed_step() -> float:
        started = time.perf_counter()
        outcome = train_step(run)
        wait()
        took = time.perf_counter() - started
        hook.after_step(run, outcome)  # not its time to save, but to make ready for it
        return took

    for _ in range(args.warmup):
        timed_step()
    quiet = [timed_step() for _ in range(3)]
    for _ in range(2):
        started = time.perf_counter()
        hook.save(run)
        stall = time.perf_counter() - started
        beside = [timed_step() for _ in range(3)]
        assert hook.saver is not None, "made by the first save"
        outcome = hook.saver.wait()
        assert outcome is not None, "it was waited for"
        saves.append(
            {
                "stall_seconds": stall,
                "bytes": outcome.num_bytes,
                "background_seconds": outcome.seconds,
                "gigabytes_per_second": outcome.num_bytes / outcome.seconds / 1e9,
                "step_seconds_meanwhile": beside,
                "problem": outcome.problem,
            }
        )
    stop_process_group()
    return {"step_seconds": quiet, "saves": saves}


def kill(words: list[str]) -> Record:
    """`kill -9` of a rank of `litespark train`; this process is no rank itself."""
    from tools.benchmarks.multi_gpu_kill import kill_a_rank

    return kill_a_rank(Path(os.environ["LITESPARK_BENCH_SCRATCH"]), words)


def peer(words: list[str]) -> Record | None:
    """`peer_mcore.py`."""
    from tools.benchmarks.peer_mcore import measured, parser

    return measured(parser().parse_args(words))


KINDS = {"bench": bench, "losses": losses, "checkpoint": checkpoint, "kill": kill, "peer": peer}

if __name__ == "__main__":
    sys.exit(main())
