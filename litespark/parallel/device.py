"""One answer to "where do we compute?": a CUDA device with NCCL, or the CPU with gloo."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from litespark.utils.processes import available_cores


@dataclass(frozen=True)
class ComputeDevice:
    """This process's device and the communication backend that goes with it."""

    type: Literal["cpu", "cuda"]
    device: torch.device
    distributed_backend: str

    @property
    def name(self) -> str:
        """Name for people, e.g. `NVIDIA H100 80GB HBM3` or `CPU`."""
        return torch.cuda.get_device_name(self.device) if self.type == "cuda" else "CPU"

    def synchronize(self) -> None:
        """Wait until the work queued on the device is done."""
        if self.type == "cuda":
            torch.cuda.synchronize(self.device)


def has_cuda() -> bool:
    """Whether there is a CUDA device that this process may use; the first that is asked of CUDA."""
    # One hardware queue keeps the order in which kernels and collectives were launched, which is
    # how megatron-core overlaps them; it is read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def prepare_megatron() -> None:
    """Without a CUDA device, import megatron-core without what is of use to CUDA devices only.

    Transformer Engine and apex are made to look as if they were not installed: megatron-core takes
    their optimizers and norms wherever they can be imported, and those compute on CUDA devices
    only.  A login node has the cluster's environment and no GPU.

    Its `jit_fuser` is switched off: importing torch's Inductor for it takes a quarter of a rank's
    start, and a fused function would look for a C++ compiler when it is first called.

    Must be called before megatron-core is imported, and changes this process alone.
    """
    if has_cuda():
        return
    for package in ("transformer_engine", "apex"):
        if package not in sys.modules:
            sys.modules[package] = None  # type: ignore[assignment] - how Python marks absence
    if "megatron.core" in sys.modules:
        return
    # megatron-core decorates while it is imported, so `disable_jit_fuser` alone comes too late.
    compiler, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compiler
    disable_jit_fuser()


def select_device(local_rank: int, local_world_size: int) -> ComputeDevice:
    """Take the GPU of this local rank, or the CPU with its share of the cores.

    The share matters: eight processes that each start a thread per core spend their time waiting
    for each other.  `OMP_NUM_THREADS` set by the user wins.
    """
    if has_cuda():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # Object collectives and control flags go over gloo: they must not wait for the GPU.
        return ComputeDevice("cuda", device, "cpu:gloo,cuda:nccl")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_world_size))
    return ComputeDevice("cpu", torch.device("cpu"), "gloo")


def cudnn_version() -> str | None:
    """The version of cuDNN that torch uses; None without cuDNN.

    torch refuses to tell when another package has loaded an older one before it (Transformer Engine
    loads the system's); then the refusal itself is what distinguishes this machine.
    """
    try:
        version = torch.backends.cudnn.version()
    except RuntimeError as error:
        return str(error).split(". ")[0]
    return None if version is None else str(version)
