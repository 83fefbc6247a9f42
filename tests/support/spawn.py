"""Run one function in several processes, as `torchrun` would, and collect what each rank returns.

The processes are forked from a server that has torch and megatron-core imported already, so a run
costs about a second instead of six.  The function itself initialises `torch.distributed`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tools.free_port import free_port

PRELOAD = [
    "tests.support.without_gpu",
    "torch",
    "torch.distributed.checkpoint",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    # What every rank would import for itself: 0.7 s of a CPU, some 750 times in a run of all tests.
    "litespark.config",
    "litespark.training.run",
    "litespark.training.hooks.fp8_guard",
    "tests.support.runs",
    "pytest",
]


class RankFailed(RuntimeError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 500
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in `world_size` processes and return one result per rank.

    Args:
        fn: a function at the top level of an importable module; its results must be picklable.
        world_size: how many processes to start.
        args: passed on to `fn`; must be picklable.
        timeout_seconds: after this long, all processes are killed.

    Raises:
        RankFailed: as soon as one rank raises or dies, or when the time is over.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    _start_server()
    port = free_port()
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            # Not a daemon: megatron-core starts checkpoint writers from within the ranks.
            process = context.Process(
                target=_run_rank, args=(theirs, fn, rank, world_size, port, args), daemon=False
            )
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        results = _collect(connections, time.monotonic() + timeout_seconds, timeout_seconds)
        for process in processes:
            process.join(timeout=5)
        return results
    finally:
        for process in processes:
            _end(process)
        for connection in connections:
            connection.close()


def _start_server() -> None:
    """Start the server, if it does not run yet, so that it imports torch for one thread and no GPU.

    These are gloo processes on the CPU, also where there is a GPU: several NCCL ranks cannot share
    one, and CUDA, once asked for, does not survive a fork.
    """
    wanted = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _collect(connections: list[Connection], deadline: float, timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        pending = {c: rank for rank, c in enumerate(connections) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = ", ".join(str(rank) for rank in pending.values())
            raise RankFailed(f"not finished after {timeout_seconds:g} s: ranks {ranks}")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending[connection]
            try:
                # Written by our own child process.
                succeeded, value = pickle.loads(connection.recv_bytes())  # noqa: S301
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if not succeeded:
                raise RankFailed(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _run_rank(
    connection: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    args: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)  # so that what the rank starts can be ended with it
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        # Plain pickle: torch's own would pass tensors as handles that die with this process.
        message = pickle.dumps((True, fn(rank, world_size, *args)))
    except BaseException:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
        # The ordinary way out would wait for the other ranks.
        os._exit(1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    connection.send_bytes(message)


def _end(process: BaseProcess) -> None:
    """Kill a rank and everything it started."""
    assert process.pid is not None
    process.kill()
    # The group is missing when the rank had no time to make it, or has ended without children.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
