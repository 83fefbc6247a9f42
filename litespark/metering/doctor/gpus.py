"""The GPUs, as their driver sees them: through NVML, without starting CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from litespark.metering.doctor.finding import Finding, fine, warning, wrong

_MIB = 1 << 20
_IDLE_BYTES = 1 << 30  # of memory in use; a driver alone takes some hundred MiB
# The oldest driver for a major version of CUDA, by NVIDIA's table of minor-version compatibility.
_OLDEST_DRIVER = {12: 525, 13: 580}


@contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]


def check_devices() -> Iterator[Finding]:
    """Which GPUs there are, and whether torch can use them."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        with _nvml() as nvml:
            names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in _handles(nvml)]
            driver = _text(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML's library comes with the driver
        names, driver = [], ""
    if not names:
        if usable:
            yield warning("GPUs", f"torch sees {usable}, the driver's NVML none", "nvidia-smi")
        else:
            yield fine("GPUs", "none: runs compute on the CPU")
        return
    kinds = {name: names.count(name) for name in names}
    seen = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    if len(kinds) > 1:
        yield warning("GPUs", f"{seen}: the slowest sets the pace", "CUDA_VISIBLE_DEVICES=...")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    built = torch.version.cuda
    if built is None:
        fix = "pip install torch from the index of your CUDA version, see pytorch.org"
        yield wrong("GPUs", f"{seen}, and torch {torch.__version__} was built without CUDA", fix)
    elif not usable and hidden is None:
        fix = "nvidia-smi; nvidia-smi -q | grep -i fabric (NVSwitch machines need fabricmanager)"
        yield wrong("GPUs", f"{seen}, and torch can start none", fix)
    else:
        of_them = "" if usable == len(names) else f", of which this process sees {usable}"
        yield fine("GPUs", seen + of_them)
    if built is None:
        return
    oldest = _OLDEST_DRIVER.get(int(built.partition(".")[0]), 0)
    if int(driver.partition(".")[0] or 0) < oldest:
        fix = f"install driver {oldest} or newer, or torch for an older CUDA"
        yield wrong("driver", f"{driver}, too old for CUDA {built}", fix)
    else:
        yield fine("driver", f"{driver}, for torch's CUDA {built}")
    if torch.cuda.is_available():
        from torch.cuda import nccl

        yield fine("NCCL", ".".join(map(str, nccl.version())))


def check_health() -> Iterator[Finding]:
    """Power caps, clocks, memory errors, and who else uses the GPUs."""
    try:
        with _nvml() as nvml:
            found = [
                finding
                for index, handle in enumerate(_handles(nvml))
                for finding in _look_at(nvml, index, handle)
            ]
            count = nvml.nvmlDeviceGetCount()
    except Exception:  # as above; `check_devices` has said so
        return
    yield from found
    if count and not found:
        yield fine(
            "GPU health", f"{count} GPUs: no power cap, no throttling, no memory error, idle"
        )


def _look_at(nvml: Any, index: int, handle: Any) -> Iterator[Finding]:
    name = f"GPU {index}"
    limit = _try(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    default = _try(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    if limit is not None and default is not None and limit < 0.98 * default:
        seen = f"power is capped at {limit / 1000:.0f} W of {default / 1000:.0f} W"
        yield warning(name, seen, f"nvidia-smi -i {index} -pl {default // 1000}")
    reasons = _try(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if reasons is None:
        reasons = _try(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    for bit, words in (
        (0x08, "slowed down by the hardware (power brake or heat)"),
        (0x20, "slowed down by its driver because of heat"),
        (0x40, "slowed down by the hardware because of heat"),
        (0x80, "slowed down by the power supply's brake"),
        (0x02, "held at clocks that somebody has set"),
    ):
        if reasons & bit:
            fix = f"nvidia-smi -i {index} -rgc" if bit == 0x02 else "nvidia-smi -q -d PERFORMANCE"
            yield warning(name, words, fix)
    errors = _try(
        nvml.nvmlDeviceGetTotalEccErrors,
        handle,
        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        nvml.NVML_VOLATILE_ECC,
    )
    if errors:
        yield wrong(name, f"{errors} memory errors since the last start", "take the node out")
    memory = _try(nvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is not None and memory.used > _IDLE_BYTES:
        seen = f"{memory.used / _MIB:.0f} MiB are in use by other processes"
        yield warning(name, seen, f"nvidia-smi -i {index}")


def check_links() -> Iterator[Finding]:
    """NVLink between the GPUs of this machine, and NVSwitch's state."""
    try:
        with _nvml() as nvml:
            handles = _handles(nvml)
            active = [_active_links(nvml, handle) for handle in handles]
    except Exception:  # as above
        return
    if len(handles) < 2:
        return
    if not any(active):
        fix = "nvidia-smi topo -m; keep parallel.tensor small, traffic goes over PCIe"
        yield warning("NVLink", f"{len(handles)} GPUs without NVLink", fix)
    elif len(set(active)) > 1:
        counts = ", ".join(f"GPU {i}: {count}" for i, count in enumerate(active))
        yield wrong("NVLink", f"some links are down ({counts})", "nvidia-smi nvlink --status")
    else:
        yield fine("NVLink", f"{active[0]} links up on each of {len(handles)} GPUs")


def check_numa() -> Iterator[Finding]:
    """Whether this process may use the cores that are next to its GPUs."""
    try:
        with _nvml() as nvml:
            words = -(-(os.cpu_count() or 1) // 64)
            masks = [
                _try(nvml.nvmlDeviceGetCpuAffinity, handle, words) for handle in _handles(nvml)
            ]
    except Exception:  # as above
        return
    allowed = os.sched_getaffinity(0)
    far = []
    for index, mask in enumerate(masks):
        near = {
            64 * i + bit
            for i, word in enumerate(mask or ())
            for bit in range(64)
            if word >> bit & 1
        }
        if near and not near & allowed:
            far.append(str(index))
    if far:
        fix = (
            "bind each process to its GPU's node: nvidia-smi topo -m, srun --gpus-per-task, numactl"
        )
        yield warning("NUMA", f"no core next to GPU {', '.join(far)} may be used", fix)
    elif masks:
        yield fine("NUMA", "cores next to every GPU may be used")


def _active_links(nvml: Any, handle: Any) -> int:
    links = range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18))
    return sum(_try(nvml.nvmlDeviceGetNvLinkState, handle, link) == 1 for link in links)


def _try(function: Any, *arguments: Any) -> Any:
    """What NVML answers; None where this GPU or driver does not know."""
    try:
        return function(*arguments)
    except Exception:
        return None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
