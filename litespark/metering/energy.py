"""Energy of the GPU, from the counter in its driver, and of the host, from its processors'.

NVML keeps the total energy of each GPU since the driver was loaded, in millijoules, integrated in
the device itself.  Two readings around a piece of work give its energy without sampling power.  The
counter covers the whole board, so other processes on the same GPU are in it too; for a MIG slice,
which shares the board with others, there is therefore no figure.

CUDA numbers devices within CUDA_VISIBLE_DEVICES and by speed, NVML by PCI bus; only the UUID names
the same GPU in both.

RAPL keeps the energy of each processor package and of its memory in microjoules, and wraps around;
since 2020 (CVE-2020-8694) most systems let root alone read it.
Source: Linux, Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_JOULES_PER_MILLIJOULE = 1e-3
_JOULES_PER_MICROJOULE = 1e-6
_POWERCAP = Path("/sys/class/powercap")

_logger = logging.getLogger(__name__)


class EnergyMeter:
    """Reads the energy counter of one GPU of this process.

    On a machine without CUDA it has nothing to read and says nothing; where there is a GPU whose
    counter cannot be read, it logs one warning.  In both cases every reading is None.

    Args:
        device_index: CUDA index of the GPU as this process sees it; default: the current device.
    """

    def __init__(self, device_index: int | None = None) -> None:
        self._pynvml: Any = None
        self._handle: Any = None
        self._last_joules = 0.0
        if not torch.cuda.is_available():
            return
        try:
            # Imported here: on a machine without a GPU the package may be missing or useless.
            import pynvml

            index = torch.cuda.current_device() if device_index is None else device_index
            properties = torch.cuda.get_device_properties(index)
            if "MIG" in str(getattr(properties, "name", "")):
                raise RuntimeError("a MIG slice shares the counter of its GPU with others")
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            self._pynvml = pynvml
        except Exception as error:  # any driver fault costs the figure, never the run
            self._give_up(error)

    def read_joules(self) -> float | None:
        """Energy since the driver was loaded, in joules; take differences.  None: not measured."""
        if self._pynvml is None:
            return None
        try:
            millijoules = self._pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            joules = float(millijoules) * _JOULES_PER_MILLIJOULE
            if joules < self._last_joules:
                raise RuntimeError("the counter went back, as when the driver is loaded again")
        except Exception as error:  # as above
            self._give_up(error)
            return None
        self._last_joules = joules
        return joules

    def read_watts(self) -> float | None:
        """Power that the driver reports now, in watts; None: not measured."""
        if self._pynvml is None:
            return None
        try:
            milliwatts = self._pynvml.nvmlDeviceGetPowerUsage(self._handle)
        except Exception as error:  # as above
            self._give_up(error)
            return None
        return float(milliwatts) * 1e-3

    def _give_up(self, error: Exception) -> None:
        # Once given up, the meter is not asked again: the warning stands once in the log, and a
        # counter that comes and goes would give sums with holes.
        self._pynvml = None
        _logger.warning("the GPU's energy cannot be measured: %s: %s", type(error).__name__, error)


@dataclass
class _Zone:
    """One counter of RAPL: where it is, where it wraps around, what it last said, and the sum."""

    path: Path
    range_joules: float
    last_joules: float
    total_joules: float = 0.0

    def read(self) -> float:
        """Joules since the meter was made; a counter that has gone back has wrapped around once."""
        now = _joules_in(self.path / "energy_uj")
        passed = now - self.last_joules
        self.total_joules += passed + (self.range_joules if passed < 0 else 0.0)
        self.last_joules = now
        return self.total_joules


class HostEnergyMeter:
    """Reads the energy of this machine's processors and of their memory, where that is allowed.

    Where it is not, every reading is None, without a word: that is the usual case.

    Args:
        folder: of the powercap files.
    """

    def __init__(self, folder: Path = _POWERCAP) -> None:
        try:
            found = [_zone(path) for path in sorted(folder.glob("intel-rapl:*"))]
        except (OSError, ValueError):
            found = []
        # Zones within a package (core, uncore) are in its sum; memory is not.
        self._zones = [zone for zone in found if zone is not None]

    def read_joules(self) -> float | None:
        """Joules since the meter was made; None: not measured."""
        try:
            return sum(zone.read() for zone in self._zones) if self._zones else None
        except (OSError, ValueError) as error:
            self._zones = []
            _logger.warning("the host's energy cannot be measured any more: %s", error)
            return None


def _zone(path: Path) -> _Zone | None:
    name = (path / "name").read_text(encoding="ascii").strip()
    if not name.startswith(("package", "dram")):
        return None
    largest = _joules_in(path / "max_energy_range_uj")
    return _Zone(path, largest, _joules_in(path / "energy_uj"))


def _joules_in(path: Path) -> float:
    return int(path.read_text(encoding="ascii")) * _JOULES_PER_MICROJOULE
