"""Kernel tests: natively where there is a GPU, through Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.deterministic

from litespark.ops.dispatch import kernels_on_cpu
from litespark.ops.formats import E4M3, E5M2

tl = pytest.importorskip("triton.language", reason="Triton has no wheel for this platform")
interpreter = pytest.importorskip("triton.runtime.interpreter")

TORCH_DTYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: E4M3,
    tl.float8e5: E5M2,
}
CARRIERS = {8: np.uint8, 16: np.uint16, 32: np.uint32}


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where the kernels of this test run."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with kernels_on_cpu():
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an element that no kernel writes is found."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds as the GPU does, to nearest even.

    Its own conversion truncates to bf16, and to FP8 it loses the carry of a mantissa that is
    rounded up to the next power of two (127 became 64), rounds ties up and subnormals down.
    """
    original: Callable[..., Any] = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        known = source in TORCH_DTYPES and target in TORCH_DTYPES
        if not known or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return original(values, source, target, rounding)
        bits = np.array(values).view(CARRIERS[source.primitive_bitwidth]).reshape(-1)
        converted = torch.from_numpy(bits).view(TORCH_DTYPES[source]).to(TORCH_DTYPES[target])
        raw = converted.view(torch.uint8).numpy().view(CARRIERS[target.primitive_bitwidth])
        return raw.reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
