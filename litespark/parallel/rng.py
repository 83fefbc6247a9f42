"""Random numbers that do not depend on the layout of the processes."""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GPU_STATE_BYTES = 16  # a seed and an offset; a CPU's generator has 5 kB


def seed_all(seed: int) -> None:
    """Seed all generators of this process: Python's, numpy's, torch's and megatron-core's."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def seed_anew(seed: int, step: int) -> None:
    """Seed as `seed_all`, with numbers that a run of this seed has not drawn before this step."""
    digest = hashlib.sha256(f"{seed}/resumed at step {step}".encode()).digest()
    seed_all(int.from_bytes(digest[:4], "little") >> 1)


def random_states() -> dict[str, Any]:
    """The state of every generator of this process, as JSON can hold it.

    Python's, numpy's, torch's on the CPU and on the GPU, and megatron-core's, whose states differ
    between tensor-parallel ranks.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch_cpu": _to_text(torch.get_rng_state()),
        "torch_device": _to_text(torch.cuda.get_rng_state()),
        "megatron": {key: _to_text(state) for key, state in tracker.get_states().items()},
    }


def fit_this_device(states: dict[str, Any]) -> bool:
    """Whether the states of the device's generators come from a device of this kind, GPU or CPU.

    Raises:
        KeyError, TypeError, ValueError: they are not what `random_states` returns.
    """
    saved, own = _to_tensor(states["torch_device"]), torch.cuda.get_rng_state()
    return (saved.numel() == _GPU_STATE_BYTES) == (own.numel() == _GPU_STATE_BYTES)


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back to what `random_states` returned.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is not what that function returns.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_to_tensor(states["torch_cpu"]))
    torch.cuda.set_rng_state(_to_tensor(states["torch_device"]))
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states({key: _to_tensor(text) for key, text in states["megatron"].items()})


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _to_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def named_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator whose stream depends on the run's seed and a name, and on nothing else.

    Every rank that asks for the same name draws the same numbers, so a parameter has the same
    initial value however it is sharded.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
