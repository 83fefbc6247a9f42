"""Peak memory of this process, for the metrics and for checking the planner.

On a GPU it is the peak of torch's allocator, the tensors' own memory: the CUDA context, NCCL's
buffers and cached free blocks come on top.  On a CPU it is the peak resident size of the whole
process.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_BYTES_PER_KIB = 1024
_STATUS_FILE = Path("/proc/self/status")


def _peak_resident_bytes() -> int:
    try:
        # Not getrusage on Linux: its figure survives exec, so a process started by a large launcher
        # would report the launcher's size.
        status = _STATUS_FILE.read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0]) * _BYTES_PER_KIB
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts in bytes, the other systems in KiB.
        return peak if sys.platform == "darwin" else peak * _BYTES_PER_KIB


def peak_memory_bytes(device_type: str | None = None) -> int:
    """The most memory held at once since the process started, in bytes.

    Args:
        device_type: `cuda` or `cpu`, where the tensors are; default: `cuda` if there is one.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _peak_resident_bytes()
