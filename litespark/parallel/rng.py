"""Random numbers that do not depend on the layout of the processes."""

from __future__ import annotations

import hashlib

import torch


def seed_all(seed: int) -> None:
    """Seed torch's and megatron-core's generators of this process."""
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def named_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator whose stream depends on the run's seed and a name, and on nothing else.

    Every rank that asks for the same name draws the same numbers, so a parameter has the same
    initial value however it is sharded.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
