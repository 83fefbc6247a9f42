"""Which attention library computes a case: measured once, kept on disk, the same on all ranks.

Which library is the fastest depends on the GPU, the shape and the versions installed, so forward
and backward of every candidate are timed on random data of the case, in the memory layout that
training has.  That happens at the first step only: the result is kept in this process and in
`~/.cache/litespark/attention.json`, under the GPU's name, the versions and the case.

Libraries round differently, so ranks with the same case have to take the same one.  The first rank
to meet a case measures it and publishes the result in the store of the default process group; the
others wait for it there.  This is no collective on purpose: a pipeline stage meets its first case
when the stage before has sent its output, which a broadcast within that stage's step would prevent.

Where nothing is to be measured (generating text, where every token is a new case), the first
library that can is taken, in the order of `BACKENDS`.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from litespark.errors import LitesparkError, UserError
from litespark.modules.attention_backends import (
    BACKENDS,
    AttentionBackend,
    AttentionCase,
)
from litespark.modules.documents import Documents
from litespark.parallel.device import cudnn_version
from litespark.utils.choice_cache import ChoiceCache, cache_path

WARM_UP, REPEATS = 2, 5
_PACKAGES = ("flash-attn-4", "flash-attn-3", "flash_attn_3", "flash-attn")
_LOGGER = logging.getLogger(__name__)

Measure = Callable[[AttentionBackend, AttentionCase], float]


@dataclass(frozen=True)
class Choice:
    """The outcome for one case: the library, the times of all, and why others gave none."""

    backend: str
    milliseconds: dict[str, float]
    failures: dict[str, str]

    def __str__(self) -> str:
        ranking = sorted((time, name) for name, time in self.milliseconds.items())
        others = ", ".join(f"{name} {time:.2f}" for time, name in ranking if name != self.backend)
        own = f"{self.milliseconds[self.backend]:.2f} ms"
        return f"{self.backend} ({own}; {others})" if others else f"{self.backend} ({own})"

    @classmethod
    def parse(cls, value: Any) -> Choice | None:
        """The choice that JSON holds; None for anything else."""
        try:
            times = {str(name): float(time) for name, time in value["milliseconds"].items()}
            failures = {str(name): str(reason) for name, reason in value["failures"].items()}
            return cls(value["backend"], times, failures) if value["backend"] in times else None
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            return None


class AttentionChooser:
    """Chooses among `backends`, each case once.

    Args:
        backends: in the order of preference where nothing is measured.
        measure: milliseconds of one forward and backward; raises where the backend cannot.
        machine: a name for the GPU and the versions installed; results hold for it only.
        cache_path: the file of results; None where there is no place for one.
    """

    def __init__(
        self,
        backends: Sequence[AttentionBackend],
        measure: Measure,
        machine: Callable[[], str],
        cache_path: Callable[[], Path | None],
    ) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._measure = measure
        self._machine = machine
        self._cache = ChoiceCache(cache_path, "attention")
        self._decided: dict[AttentionCase, AttentionBackend] = {}

    def choose(
        self, case: AttentionCase, *, force: str | None = None, measure: bool = True
    ) -> AttentionBackend:
        """The backend for a case.

        Args:
            case: what is to be computed.
            force: the name of the backend to take, whatever its speed.
            measure: whether candidates may be timed, if this case never was.

        Raises:
            UserError: the forced backend is unknown, not installed or cannot compute the case.
            LitesparkError: no backend computes the case.
        """
        if force is not None:
            return self._forced(case, force)
        decided = self._decided.get(case)
        if decided is not None:
            return decided
        candidates = self._candidates(case)
        if len(candidates) > 1 and not measure:
            return candidates[0]
        if len(candidates) > 1:
            names = [backend.name for backend in candidates]
            key = f"{self._machine()} | {case}"
            choice = _agreed(key, lambda: self._remembered(key, names, case))
            decided = self._backends[choice.backend]
        else:
            decided = candidates[0]
            if measure and case.device_type == "cuda":
                _LOGGER.info("attention: %s, the only one for %s", decided.name, case)
        self._decided[case] = decided
        return decided

    def _forced(self, case: AttentionCase, name: str) -> AttentionBackend:
        backend = self._backends.get(name)
        problem = "there is no such backend" if backend is None else _reason(backend, case)
        if backend is not None and problem is None:
            return backend
        others = "; ".join(
            f"{other.name}: {_reason(other, case) or 'can be used'}"
            for other in self._backends.values()
            if other is not backend
        )
        raise UserError(
            f"attention backend '{name}' for {case}",
            problem or "",
            f"Take another, or none to have the fastest chosen ({others}).",
        )

    def _candidates(self, case: AttentionCase) -> list[AttentionBackend]:
        able = [b for b in self._backends.values() if _reason(b, case) is None]
        candidates = [backend for backend in able if not backend.last_resort] or able
        if not candidates:
            reasons = "; ".join(f"{b.name}: {_reason(b, case)}" for b in self._backends.values())
            raise LitesparkError(f"no attention backend computes {case} ({reasons})")
        return candidates

    def _remembered(self, key: str, names: list[str], case: AttentionCase) -> Choice:
        """What the file of results says, or a measurement, which is added to it."""

        def parse(value: Any) -> Choice | None:
            choice = Choice.parse(value)
            return choice if choice is not None and choice.backend in names else None

        known = self._cache.find(key, parse)
        if known is not None:
            return known
        choice = self._measured(names, case)
        return self._cache.settle(key, asdict(choice), parse) or choice

    def _measured(self, names: list[str], case: AttentionCase) -> Choice:
        times, failures = self._timed(names, case)
        if not times:
            last = [b.name for b in self._backends.values() if b.last_resort]
            times, more = self._timed([name for name in last if name not in names], case)
            failures |= more
        if not times:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
            raise LitesparkError(f"every attention backend failed at {case} ({reasons})")
        return Choice(min(times, key=lambda name: times[name]), times, failures)

    def _timed(
        self, names: list[str], case: AttentionCase
    ) -> tuple[dict[str, float], dict[str, str]]:
        times: dict[str, float] = {}
        failures: dict[str, str] = {}
        for name in names:
            backend = self._backends[name]
            if _reason(backend, case) is not None:
                continue
            try:
                with _saved_as_it_is():
                    times[name] = self._measure(backend, case)
            except Exception as error:  # out of memory, a failed compilation, an unknown shape
                failures[name] = f"{type(error).__name__}: {_first_line(error)}"
        return times, failures


def _saved_as_it_is() -> AbstractContextManager[object]:
    """Within the block autograd keeps what it saves, whatever a caller has arranged.

    A case is met first within a layer's forward pass, which activation checkpointing keeps nothing
    of: the backward of a measurement would have that pass computed again, around itself.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def choose_attention(
    case: AttentionCase, *, force: str | None = None, measure: bool = True
) -> AttentionBackend:
    """The fastest backend for a case on this machine; see `AttentionChooser.choose`.

    Raises:
        UserError: the forced backend is unknown, not installed or cannot compute the case.
        LitesparkError: no backend computes the case.
    """
    keep_compiled_kernels()
    return _CHOOSER.choose(case, force=force, measure=measure)


def keep_compiled_kernels() -> None:
    """Have FlashAttention's CuTe kernels, which take 10 s to compile, kept for the next start.

    The library reads this when it is imported, and by itself keeps nothing.  In the user's own
    folder, not in the library's default under /tmp: what is kept is loaded as code.
    """
    folder = cache_path("flash_attention_cute")
    if folder is not None:
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def random_inputs(
    case: AttentionCase, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (which require gradients) and a gradient of the output, [s, b, heads, d] in memory.

    Drawn from a generator of its own, so that a run's random numbers do not depend on the cache.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(length: int, heads: int) -> Tensor:
        shape = (length, case.batch, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    q_sbnd, gradient_sbnd = (draw(case.q_length, case.heads) for _ in range(2))
    k_sbgd, v_sbgd = (draw(case.kv_length, case.groups) for _ in range(2))
    for tensor in (q_sbnd, k_sbgd, v_sbgd):
        tensor.requires_grad_()
    return q_sbnd, k_sbgd, v_sbgd, gradient_sbnd


def even_documents(case: AttentionCase, device: torch.device, count: int = 8) -> Documents | None:
    """Documents of about equal length for a case with document masks, else None."""
    if not case.variable_length:
        return None
    total = case.batch * case.q_length
    count = min(count, total)
    marks = [total * index // count for index in range(count + 1)]
    longest = max(end - start for start, end in pairwise(marks))
    return Documents(torch.tensor(marks, dtype=torch.int32, device=device), longest)


def measure_on_gpu(backend: AttentionBackend, case: AttentionCase) -> float:
    """Median milliseconds of forward and backward on the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    events = []
    with torch.inference_mode(False), torch.enable_grad():
        *leaves, gradient_sbnd = random_inputs(case, device)
        documents = even_documents(case, device)
        for _ in range(WARM_UP + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            output_bsnd = backend.attend(
                *(tensor.transpose(0, 1) for tensor in leaves),
                causal_bottom_right=case.causal,
                documents=documents,
            )
            torch.autograd.grad(output_bsnd, leaves, gradient_sbnd.transpose(0, 1))
            end.record()
            events.append((start, end))
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in events[WARM_UP:])


@lru_cache
def machine_name() -> str:
    """The GPU and everything whose version decides how fast a backend is."""
    parts = [
        torch.cuda.get_device_name(),
        f"torch {torch.__version__}",
        f"cudnn {cudnn_version()}",
    ]
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(parts)


def default_cache_path() -> Path | None:
    """`attention.json` under $XDG_CACHE_HOME or ~/.cache; None for a user without a home."""
    return cache_path("attention.json")


def _agreed(key: str, decide: Callable[[], Choice]) -> Choice:
    """`decide()` of the first rank of the job that asks for this key; the others wait for it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        choice = decide()
    else:
        store = distributed_c10d._get_default_store()
        entry = f"litespark/attention/{key}"
        if store.add(f"{entry}/askers", 1) == 1:
            try:
                choice = decide()
            except BaseException:
                store.set(entry, "null")  # so that the others do not wait for a rank that failed
                raise
            store.set(entry, json.dumps(asdict(choice)))
        else:
            published = Choice.parse(json.loads(store.get(entry)))
            if published is None:
                raise LitesparkError("another rank failed to choose an attention backend")
            choice = published
    for name, reason in choice.failures.items():
        _LOGGER.warning("attention: %s failed when measured and is not used: %s", name, reason)
    _LOGGER.info("attention: %s for %s", choice, key.rpartition(" | ")[2])
    return choice


def _reason(backend: AttentionBackend, case: AttentionCase) -> str | None:
    """Why a backend cannot compute a case on this machine; None when it can."""
    return backend.supports(case) or backend.missing()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


_CHOOSER = AttentionChooser(BACKENDS, measure_on_gpu, machine_name, default_cache_path)
