"""The machine apart from its GPUs: cores, memory, limits, disks, clock, name and network."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from litespark.metering.doctor.finding import Finding, fine, warning, wrong
from litespark.utils.network import interface_of, is_loopback, outward_address
from litespark.utils.processes import available_cores

_GB = 1e9
_SHM_BYTES = 1 << 30  # NCCL takes some tens of MiB a process
_OPEN_FILES = 4096  # sockets to every other rank, shards, checkpoints
_FREE_BYTES = 20 * _GB
_SLOW_DISK_BYTES_PER_SECOND = 0.2 * _GB
_DISK_TEST_BYTES = 128 << 20
_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
_SYSFS_FABRICS = Path("/sys/class/infiniband")


def check_cores() -> Iterator[Finding]:
    """Cores that this process may use, and whether they run at full speed."""
    cores, all_cores = available_cores(), os.cpu_count() or 1
    numa = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    seen = f"{cores} of {all_cores} cores, {numa} NUMA node{'s' if numa > 1 else ''}"
    if cores < all_cores / 2:
        fix = "ask the scheduler for all cores of the node (Slurm: --exclusive, --cpus-per-task)"
        yield warning("cores", f"{seen}: this process may use only part of them", fix)
    else:
        yield fine("cores", seen)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists() and (mode := governor.read_text().strip()) not in (
        "performance",
        "schedutil",
    ):
        yield warning("cpu clock", f"governor {mode}", "cpupower frequency-set -g performance")


def check_memory() -> Iterator[Finding]:
    """Free memory, and the shared memory through which processes of a machine talk."""
    import psutil

    memory = psutil.virtual_memory()
    yield fine("memory", f"{memory.available / _GB:.0f} of {memory.total / _GB:.0f} GB free")
    if not Path("/dev/shm").is_dir():
        yield warning("shared memory", "there is no /dev/shm", "mount -t tmpfs tmpfs /dev/shm")
        return
    size = shutil.disk_usage("/dev/shm")
    seen = f"/dev/shm: {size.free / _GB:.1f} of {size.total / _GB:.1f} GB free"
    if size.free < _SHM_BYTES:
        fix = "docker run --shm-size=16g, or --ipc=host; Kubernetes: an emptyDir of medium Memory"
        yield wrong("shared memory", seen, fix)
    else:
        yield fine("shared memory", seen)


def check_limits() -> Iterator[Finding]:
    """ulimits: open files, and memory that may be locked (RDMA needs it)."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _OPEN_FILES:
        fix = f"ulimit -n {hard if hard > files else 65536}"
        yield warning("open files", f"at most {files}", fix)
    else:
        yield fine("open files", f"at most {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    seen = "unlimited" if unlimited else f"at most {locked / _GB:.3f} GB"
    if not unlimited and _SYSFS_FABRICS.is_dir() and any(_SYSFS_FABRICS.iterdir()):
        fix = "ulimit -l unlimited (docker run --ulimit memlock=-1): RDMA locks its buffers"
        yield wrong("locked memory", seen, fix)
    else:
        yield fine("locked memory", seen)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Space and speed of the disk under a folder: written with fsync, read past the cache."""
    free = shutil.disk_usage(folder).free
    if free < _FREE_BYTES:
        yield warning("disk space", f"{free / _GB:.1f} GB free in {folder}", "give another --path")
    else:
        yield fine("disk space", f"{free / _GB:.0f} GB free in {folder}")
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".litespark-doctor-") as file:
            started = time.perf_counter()
            for _ in range(_DISK_TEST_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = _DISK_TEST_BYTES / (time.perf_counter() - started)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            file.seek(0)
            while file.read(len(block)):
                pass
            read = _DISK_TEST_BYTES / (time.perf_counter() - started)
    except OSError as error:
        yield wrong("disk", f"{folder}: {error.strerror}", "give a --path that can be written to")
        return
    seen = f"writes {written / _GB:.2f} GB/s, reads {read / _GB:.2f} GB/s in {folder}"
    if min(written, read) < _SLOW_DISK_BYTES_PER_SECOND:
        yield warning("disk speed", seen, "put checkpoints and data on another disk")
    else:
        yield fine("disk speed", seen)


def check_clock() -> Iterator[Finding]:
    """Whether the clock is kept right by a time server."""
    try:
        status = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return
    if status == _UNSYNCHRONISED:
        fix = "start chrony or systemd-timesyncd; `doctor --distributed` measures the skew"
        yield warning("clock", "is not synchronised with a time server", fix)
    elif status >= 0:
        yield fine("clock", "is synchronised")


def check_names() -> Iterator[Finding]:
    """Whether this machine's own name leads to an address that others reach."""
    name, outward = socket.gethostname(), outward_address()
    interface = None if outward is None else interface_of(outward)
    where = f"{outward} on {interface}" if interface else str(outward or "no address but its own")
    yield fine("address", f"{name} talks to others from {where}")
    try:
        own = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        fix = f"add `{outward or 'ADDRESS'} {name}` to /etc/hosts"
        yield warning("own name", f"{name} cannot be resolved ({error.strerror})", fix)
        return
    if is_loopback(own) and outward is not None:
        fix = f"write `{outward} {name}` into /etc/hosts; `litespark train --nnodes` does without"
        yield warning("own name", f"{name} is {own}, where no other machine finds it", fix)
    else:
        yield fine("own name", f"{name} is {own}")


def check_fabric() -> Iterator[Finding]:
    """InfiniBand and EFA adapters, their links, and EFA's plugin for NCCL."""
    adapters = sorted(_SYSFS_FABRICS.iterdir()) if _SYSFS_FABRICS.is_dir() else []
    if not adapters:
        yield fine("fabric", "no InfiniBand or EFA adapter: nodes would talk over TCP")
        return
    states, has_efa = [], False
    for adapter in adapters:
        driver = (adapter / "device" / "driver").resolve().name
        has_efa = has_efa or driver == "efa"
        for port in sorted((adapter / "ports").iterdir()):
            state = _word(port / "state")
            rate = _word(port / "rate")
            states.append(f"{adapter.name} ({driver}) {state} {rate}")
            if "ACTIVE" not in state:
                fix = "look at cable and switch: ibstat, fi_info -p efa"
                yield wrong("fabric", f"{adapter.name} port {port.name} is {state}", fix)
    shown = "; ".join(states[:4]) + (f"; {len(states) - 4} more" if len(states) > 4 else "")
    yield fine("fabric", f"{len(adapters)} adapters: {shown}")
    if has_efa:
        plugins = [
            path
            for folder in ("/opt/amazon/ofi-nccl", "/opt/aws-ofi-nccl", "/usr/local/lib")
            for path in Path(folder).rglob("libnccl-net*.so")
        ]
        if plugins:
            yield fine("EFA plugin", str(plugins[0]))
        else:
            fix = "install aws-ofi-nccl; without it NCCL talks over TCP"
            yield wrong("EFA plugin", "no libnccl-net.so was found", fix)


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"
