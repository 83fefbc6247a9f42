"""Energy of the GPU, from the counter in its driver.

NVML keeps the total energy of each GPU since the driver was loaded, in millijoules, integrated in
the device itself.  Two readings around a piece of work give its energy without sampling power.  The
counter covers the whole board, so other processes on the same GPU are in it too.

CUDA numbers devices within CUDA_VISIBLE_DEVICES and by speed, NVML by PCI bus; only the UUID names
the same GPU in both.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

_JOULES_PER_MILLIJOULE = 1e-3

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
        if not torch.cuda.is_available():
            return
        try:
            # Imported here: on a machine without a GPU the package may be missing or useless.
            import pynvml

            index = torch.cuda.current_device() if device_index is None else device_index
            uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._pynvml = pynvml
        except Exception as error:  # any driver fault costs the figure, never the run
            self._give_up(error)

    def read_joules(self) -> float | None:
        """Energy since the driver was loaded, in joules; take differences.  None: not measured."""
        if self._pynvml is None:
            return None
        try:
            millijoules = self._pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except Exception as error:  # as above
            self._give_up(error)
            return None
        return float(millijoules) * _JOULES_PER_MILLIJOULE

    def _give_up(self, error: Exception) -> None:
        # Once given up, the meter is not asked again: the warning stands once in the log, and a
        # counter that comes and goes would give sums with holes.
        self._pynvml = None
        _logger.warning("the GPU's energy cannot be measured: %s: %s", type(error).__name__, error)
