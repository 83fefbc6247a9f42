"""Installs torch so that a machine without a GPU gets the small CPU build.

On Linux, plain `pip install torch` brings several GB of CUDA packages, GPU or not.  Order here:

1. a torch that is installed and in range stays;
2. with an NVIDIA GPU, or on another system than Linux: pip's own choice;
3. otherwise the CPU build, from where pip is set up to look, or else through `uv`, which knows
   where the CPU builds are kept;
4. otherwise nothing: an error says how to take the CUDA build on purpose.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import subprocess
import sys

LOWEST, BELOW = (2, 11), (2, 14)
RANGE = f"torch>={LOWEST[0]}.{LOWEST[1]},<{BELOW[0]}.{BELOW[1]}"
CPU_BUILD = "torch==2.13.0+cpu"


def main() -> int:
    """Install, or say what to type; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torch", nargs="?", help=f"what to install instead, e.g. '{RANGE}'")
    wanted = parser.parse_args().torch
    if wanted:
        return 0 if pip_install(wanted) else 1
    if torch_in_range():
        return 0
    if has_nvidia_gpu() or not sys.platform.startswith("linux"):
        return 0 if pip_install(RANGE) else 1
    print("no NVIDIA GPU: installing torch's CPU build")
    if pip_install(CPU_BUILD, quiet_failure=True) or uv_install_cpu():
        return 0
    print(
        "The CPU build of torch was not found where pip and uv look. Nothing was installed.\n"
        "Point pip at it (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), or take the CUDA build, several "
        f"GB, on purpose:\n  make install TORCH='{RANGE}'",
        file=sys.stderr,
    )
    return 1


def torch_in_range() -> bool:
    """Whether a torch in range is installed in this environment."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    major, minor = (int(part) for part in version.split(".")[:2])
    return LOWEST <= (major, minor) < BELOW


def has_nvidia_gpu() -> bool:
    """Whether the driver shows a GPU; works in containers without nvidia-smi."""
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def pip_install(requirement: str, quiet_failure: bool = False) -> bool:
    """Install with this environment's pip; returns whether it worked."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    errors = subprocess.DEVNULL if quiet_failure else None
    return subprocess.run([*command, requirement], stderr=errors, check=False).returncode == 0


def uv_install_cpu() -> bool:
    """Install through uv, whose `--torch-backend cpu` selects the CPU builds."""
    if not pip_install("uv"):
        return False
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    return subprocess.run([*command, "--torch-backend", "cpu", RANGE], check=False).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
