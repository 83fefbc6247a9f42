"""Starts torch.distributed and megatron-core's process groups, and ends them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from litespark.config.schema import ParallelConfig
from litespark.errors import UserError
from litespark.parallel.device import ComputeDevice, has_cuda, select_device
from litespark.parallel.environment import (
    integer_from_environment,
    world_size_from_environment,
)
from litespark.utils.network import (
    address_towards,
    interface_of,
    is_loopback,
    outward_address,
    resolve,
)


@dataclass(frozen=True)
class Process:
    """This process among its siblings, as torchrun's environment variables tell it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: ComputeDevice

    @property
    def is_first(self) -> bool:
        """Whether this is global rank 0, the one that speaks to the user."""
        return self.rank == 0


def start_process_group(timeout_seconds: float) -> Process:
    """Join the default process group that torchrun's variables describe; alone, make one of 1.

    Raises:
        UserError: torchrun's variables are set only in part.
    """
    if world_size_from_environment() is None:
        process = Process(0, 1, 0, 1, select_device(0, 1))
        dist.init_process_group(
            process.device.distributed_backend, store=HashStore(), rank=0, world_size=1
        )
        return process
    rank, world_size, local_rank = (
        integer_from_environment(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    local_world_size = 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        local_world_size = integer_from_environment("LOCAL_WORLD_SIZE")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                name, "is not set, and WORLD_SIZE is", "Start with torchrun or with --nproc."
            )
    if has_cuda() and local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{local_world_size} processes on this machine",
            f"it has {torch.cuda.device_count()} GPUs, and NCCL wants one for each process",
            "Start fewer processes, or set CUDA_VISIBLE_DEVICES= to compute on the CPU.",
        )
    device = select_device(local_rank, local_world_size)
    if local_world_size < world_size:
        choose_interface()
    dist.init_process_group(device.distributed_backend, timeout=timedelta(seconds=timeout_seconds))
    return Process(rank, world_size, local_rank, local_world_size, device)


def choose_interface() -> None:
    """Have gloo listen on the interface that leads to the first rank; `GLOO_SOCKET_IFNAME` wins.

    gloo would take the address that this machine's own name resolves to, which Debian's /etc/hosts
    makes 127.0.1.1: no other machine gets there.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = address_towards(resolve(os.environ["MASTER_ADDR"]))
    if is_loopback(address):  # what the first rank's machine calls itself
        address = outward_address()
    interface = None if address is None else interface_of(address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def start_model_parallel(parallel: ParallelConfig, timeout_seconds: float) -> None:
    """Create megatron-core's groups for the degrees of the configuration."""
    from megatron.core import parallel_state

    interleaved = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=interleaved,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        # The distributed optimizer gathers its state for checkpoints over gloo, in host memory.
        create_gloo_process_groups=True,
    )


def stop_process_group() -> None:
    """Leave all groups; safe to call when none was started."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in order of rank; only for small values inside the trusted job."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; runs over gloo on the CPU, so no GPU is waited for."""
    tensor = torch.tensor([int(flag)])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())
