"""The energy of a run on this rank: its GPU's and, on the first rank of a machine, the host's.

Every rank has the same figures in the same order, so that one sum over ranks, made when a line of
metrics is written anyway, gives those of the run.  A figure that any rank could not measure is not
known for the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from litespark.metering.energy import EnergyMeter, HostEnergyMeter
from litespark.metering.ledger import PHASES, EnergyLedger, Phase
from litespark.metering.power import PowerPoller

# Names in metrics.jsonl of the joules of each phase, all GPUs together.
PHASE_KEYS: dict[Phase, str] = {
    "training": "energy_joules",
    "evaluation": "evaluation_joules",
    "checkpoint": "checkpoint_joules",
    "idle": "idle_joules",
}
HOST_KEY = "host_joules"
KEYS = (*PHASE_KEYS.values(), HOST_KEY)


class RunMeters:
    """The meters of one rank, which begin with it.

    Args:
        reads_host: whether this rank reads for its machine.
        energy: the GPU's meter; default: that of the current device.
        host: the host's; default: the machine's.
    """

    def __init__(
        self,
        *,
        reads_host: bool = False,
        energy: EnergyMeter | None = None,
        host: HostEnergyMeter | None = None,
    ) -> None:
        self.energy = EnergyMeter() if energy is None else energy
        self.reads_host = reads_host
        self.host = HostEnergyMeter() if host is None and reads_host else host
        self.ledger = EnergyLedger(self.energy.read_joules)
        self._host_joules = None if self.host is None else self.host.read_joules()
        self.poller: PowerPoller | None = None

    def enter(self, phase: Phase) -> None:
        """From now on the GPU works for this."""
        self.ledger.enter(phase)

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """The block is of this phase; then the one before goes on."""
        with self.ledger.within(phase):
            yield

    def start_polling(self) -> None:
        """Integrate power beside the counter until the run ends."""
        self.poller = PowerPoller(self.energy.read_watts)
        self.poller.start()

    def take(self) -> list[float | None]:
        """Joules since the last call in the order of `KEYS`; None: not measured.

        A rank that does not read for its machine adds 0 to the host's.
        """
        joules = self.ledger.take()
        taken: list[float | None] = [None if joules is None else joules[p] for p in PHASES]
        return [*taken, self._take_host()]

    def _take_host(self) -> float | None:
        if not self.reads_host or self.host is None:
            return 0.0
        before, now = self._host_joules, self.host.read_joules()
        self._host_joules = now
        return None if before is None or now is None else now - before
