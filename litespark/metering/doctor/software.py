"""Python, torch, megatron-core and what goes with them: there, and of a version that fits."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from litespark.metering.doctor.finding import Finding, fine, warning, wrong
from litespark.parallel.device import has_cuda

# Variables that were set to find a fault and forgotten, or copied from another cluster.
_HARMFUL = {
    ("CUDA_LAUNCH_BLOCKING", "1"): "makes every kernel wait for the one before",
    ("NCCL_P2P_DISABLE", "1"): "turns NVLink off",
    ("NCCL_IB_DISABLE", "1"): "turns InfiniBand off: traffic between nodes goes over TCP",
    ("NCCL_SHM_DISABLE", "1"): "turns shared memory between processes off",
    ("NCCL_DEBUG", "TRACE"): "writes a line for every call",
    ("NCCL_DEBUG", "INFO"): "writes pages at every start",
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"): "checks every collective, which costs a part of it",
    ("PYTHONDEVMODE", "1"): "slows Python down",
}
# Prefixes of what changes how ranks talk to each other.
_PREFIXES = ("NCCL_", "FI_", "GLOO_", "TORCH_NCCL_", "UCX_", "CUDA_")


def check_requirements() -> Iterator[Finding]:
    """Every package that Litespark declares, and Python."""
    from packaging.requirements import Requirement

    yield fine("python", f"{platform.python_version()} on {platform.machine()}")
    lines = requires("litespark") or []
    seen, bad = [], False
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            bad = True
            yield wrong(
                requirement.name,
                f"{found or 'not installed'}, and Litespark needs {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        elif requirement.name in ("torch", "megatron-core"):
            seen.append(f"{requirement.name} {found}")
    if not bad:
        yield fine("packages", f"{', '.join(seen)} and {len(lines)} others declared: all there")


def check_gpu_packages() -> Iterator[Finding]:
    """FlashAttention, Transformer Engine, Triton: wanted where there is a GPU."""
    wanted = has_cuda()
    for package, module, extra, without in (
        ("triton", "triton", "", "the fused kernels cannot run"),
        ("flash-attn-4", "flash_attn", "gpu", "attention takes cuDNN's kernel, which is slower"),
        ("transformer-engine", "transformer_engine", "te", "model.backend = te cannot be used"),
    ):
        try:
            yield fine(package, version(package))
            continue
        except PackageNotFoundError:
            there = find_spec(module) is not None
        if there:
            yield fine(package, "there, of an unknown version")
        elif not wanted:
            yield fine(package, "not installed, and of no use without a GPU")
        elif package == "transformer-engine":
            yield fine(package, f"not installed: {without}; nothing else needs it")
        else:
            fix = f"pip install 'litespark[{extra}]'" if extra else f"pip install {package}"
            yield warning(package, f"not installed: {without}", fix)


def check_variables() -> Iterator[Finding]:
    """Environment variables that change how a run computes or communicates."""
    found = {k: v for k, v in os.environ.items() if k.startswith(_PREFIXES)}
    harmful = [
        (name, value, why)
        for (name, value), why in _HARMFUL.items()
        if os.environ.get(name) == value
    ]
    for name, value, why in harmful:
        yield warning("variables", f"{name}={value} {why}", f"unset {name}")
    if not harmful:
        shown = ", ".join(f"{name}={value}" for name, value in sorted(found.items()))
        yield fine("variables", shown or "none set that changes NCCL, libfabric, gloo or CUDA")
