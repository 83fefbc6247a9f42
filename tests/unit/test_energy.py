"""Energy by phase with made-up counters: sums, faults in mid-run, the host's, the cross-check."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
import torch.distributed as dist

from litespark.metering.energy import EnergyMeter, HostEnergyMeter
from litespark.metering.ledger import EnergyLedger
from litespark.metering.measurement import Timing, energy_check, time_steps
from litespark.metering.meters import KEYS, RunMeters
from litespark.metering.power import PowerIntegral, PowerPoller, integrate
from litespark.training.hooks.energy import energy_record
from tests.support.spawn import run_distributed


class Counter:
    """A counter that adds what it is told to; `fails` makes it unreadable."""

    def __init__(self) -> None:
        self.joules = 1000.0
        self.fails = False

    def read_joules(self) -> float | None:
        return None if self.fails else self.joules

    def read_watts(self) -> float | None:
        return None if self.fails else 500.0


def test_joules_go_to_the_phase_in_which_they_were_used():
    counter = Counter()
    ledger = EnergyLedger(counter.read_joules)
    counter.joules += 5
    ledger.enter("training")
    counter.joules += 100
    with ledger.within("evaluation"):
        counter.joules += 7
        with ledger.within("checkpoint"):
            counter.joules += 2
        counter.joules += 1
    counter.joules += 10
    assert ledger.take() == {"training": 110, "evaluation": 8, "checkpoint": 2, "idle": 5}
    counter.joules += 3
    assert ledger.take() == {"training": 3, "evaluation": 0, "checkpoint": 0, "idle": 0}


def test_a_phase_that_raises_still_ends():
    counter = Counter()
    ledger = EnergyLedger(counter.read_joules, "training")

    def fail() -> None:
        with ledger.within("evaluation"):
            counter.joules += 4
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    counter.joules += 6
    taken = ledger.take()
    assert taken is not None
    assert (taken["evaluation"], taken["training"]) == (4, 6)


def test_a_counter_that_fails_in_mid_run_leaves_no_partial_sum():
    counter = Counter()
    ledger = EnergyLedger(counter.read_joules, "training")
    counter.joules += 50
    assert ledger.take() is not None
    counter.joules += 50
    counter.fails = True
    ledger.enter("evaluation")
    counter.fails = False  # it comes back, and is not believed
    counter.joules += 50
    assert ledger.take() is None
    assert ledger.take() is None


@pytest.fixture
def one_gpu(monkeypatch):
    """A GPU of CUDA whose name can be changed, and a driver with a counter."""
    gpu = types.SimpleNamespace(uuid="beef", name="NVIDIA H100 80GB HBM3")
    nvml = types.ModuleType("pynvml")
    nvml.millijoules = 5_000  # type: ignore[attr-defined]
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: nvml.millijoules  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 650_000  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return types.SimpleNamespace(gpu=gpu, nvml=nvml)


def test_a_counter_that_goes_back_is_given_up_with_one_warning(one_gpu, caplog):
    meter = EnergyMeter()
    assert meter.read_joules() == 5.0
    assert meter.read_watts() == 650.0
    one_gpu.nvml.millijoules = 100
    with caplog.at_level(logging.WARNING):
        assert [meter.read_joules() for _ in range(3)] == [None, None, None]
    assert meter.read_watts() is None
    assert [record.getMessage() for record in caplog.records if "went back" in record.message]
    assert len(caplog.records) == 1


def test_a_mig_slice_has_no_counter_of_its_own(one_gpu, caplog):
    one_gpu.gpu.name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    with caplog.at_level(logging.WARNING):
        assert EnergyMeter().read_joules() is None
    assert "shares the counter" in caplog.text


def powercap(folder, zones):
    for name, (kind, microjoules) in zones.items():
        zone = folder / name
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "name").write_text(f"{kind}\n")
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
    return folder


def test_processors_and_memory_are_summed_and_wrap_around(tmp_path):
    zones = {
        "intel-rapl:0": ("package-0", 262_143_000_000),
        "intel-rapl:0:0": ("core", 5_000_000),
        "intel-rapl:0:1": ("dram", 1_000_000),
        "intel-rapl:1": ("package-1", 0),
    }
    meter = HostEnergyMeter(powercap(tmp_path, zones))
    assert meter.read_joules() == 0
    zones["intel-rapl:0"] = ("package-0", 671_150)  # over its end: 0.32885 J and 0.67115 J
    zones["intel-rapl:0:0"] = ("core", 900_000_000)  # within the package's
    zones["intel-rapl:0:1"] = ("dram", 3_000_000)
    zones["intel-rapl:1"] = ("package-1", 4_000_000)
    powercap(tmp_path, zones)
    assert meter.read_joules() == pytest.approx(1 + 2 + 4)


def test_a_host_that_may_not_be_read_is_none_and_silent(tmp_path, caplog):
    assert HostEnergyMeter(tmp_path / "nothing").read_joules() is None
    folder = powercap(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    (folder / "intel-rapl:0" / "energy_uj").write_text("not a number")
    assert HostEnergyMeter(folder).read_joules() is None
    assert not caplog.records


def test_the_integral_is_the_area_and_says_how_far_it_may_be_off():
    found = integrate([0.0, 1.0, 3.0], [100.0, 300.0, 300.0])
    assert found == PowerIntegral(200 + 600, 100.0, 3.0, 3)
    assert integrate([0.0], [100.0]) is None


def test_the_poller_integrates_a_constant_power_exactly():
    poller = PowerPoller(lambda: 500.0, interval_seconds=0.005)
    poller.start()
    found = poller.stop()
    assert found is not None
    assert found.joules == pytest.approx(500 * found.seconds)
    assert found.uncertainty_joules == 0
    broken = PowerPoller(iter([100.0, None]).__next__, interval_seconds=0.001)
    broken.start()
    assert broken.stop() is None


def test_a_bench_compares_the_counter_with_the_integral():
    counter = Counter()

    def step():
        counter.joules += 25

    timing = time_steps(step, 4, lambda: None, counter, polls_power=True)  # type: ignore[arg-type]
    check = energy_check(timing)
    assert check is not None
    assert check["counter_joules"] == 100
    assert check["integrated_joules"] == pytest.approx(500 * check["seconds"])
    assert energy_check(Timing([1.0], 1.0, None, timing.integral)) is None
    assert energy_check(Timing([1.0], 1.0, 5.0)) is None


def test_totals_know_kilowatt_hours_and_a_grids_carbon():
    totals = dict.fromkeys(KEYS, 0.9e6)
    found = energy_record(totals, 400.0)
    assert found["gpu_joules"] == pytest.approx(3.6e6)
    assert found["kwh"] == pytest.approx(1.25)  # the host's are in it
    assert found["kg_co2e"] == pytest.approx(0.5)
    unknown = energy_record({**totals, "checkpoint_joules": None}, 400.0)
    assert unknown == {"gpu_joules": None, "kwh": None, "kg_co2e": None}
    assert energy_record({**totals, "host_joules": None}, None)["kwh"] == pytest.approx(1.0)


def take_twice(rank: int, world_size: int) -> list[dict[str, float | None]]:
    """Two lines of metrics; the second rank's counter fails between them."""
    from litespark.training.hooks.metrics import StepMetrics

    dist.init_process_group("gloo")
    counter = Counter()
    meters = RunMeters(energy=counter, reads_host=False)  # type: ignore[arg-type]
    run = types.SimpleNamespace(meters=meters)
    metrics = StepMetrics(writer=None)  # type: ignore[arg-type]
    meters.enter("training")
    lines = []
    for line in range(2):
        counter.joules += 10.0 * (rank + 1)
        counter.fails = line == 1 and rank == 1
        lines.append(metrics.take_joules(run).joules)  # type: ignore[arg-type]
    return [*lines, metrics.totals]


@pytest.mark.distributed
def test_a_counter_that_fails_on_one_rank_makes_the_runs_energy_null():
    for first, second, totals in run_distributed(take_twice, 2):
        assert first["energy_joules"] == 30.0
        assert second["energy_joules"] is None
        assert second["evaluation_joules"] is None
        assert second["host_joules"] == 0.0
        assert totals["energy_joules"] is None
