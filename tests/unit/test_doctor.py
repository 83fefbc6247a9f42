"""What the doctor finds: each check on a machine that has the fault, or a fake of it."""

from __future__ import annotations

import json
import resource
from collections import namedtuple
from types import SimpleNamespace

import pytest

from litespark.cli.main import main
from litespark.metering.doctor import gpus, machine, software, stores
from litespark.metering.doctor.finding import Finding, fine, run_checks
from litespark.metering.doctor.together import (
    _distances,
    _partner,
    format_table,
    judge_bandwidth,
)
from litespark.utils.facts import differences

NAN = float("nan")


def statuses(findings) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


# ---------------------------------------------------------------------------- the command


def test_this_machine(tmp_path, capsys):
    """Where the tests run, Litespark is installed: nothing of that is wrong."""
    assert main(["doctor", "--path", str(tmp_path)]) in (0, 1)
    shown = capsys.readouterr().out
    for name in ("python", "packages", "GPUs", "cores", "memory", "disk speed", "address"):
        assert f" {name} " in shown, name
    assert " 0 wrong" in shown or "X " in shown


def test_json(tmp_path, capsys):
    code = main(["doctor", "--json", "--path", str(tmp_path)])
    findings = [Finding(**entry) for entry in json.loads(capsys.readouterr().out)]
    assert statuses(findings)["packages"] == "fine"
    assert code == any(finding.status == "wrong" for finding in findings)
    for finding in findings:
        if finding.status == "wrong":
            assert finding.fix, "what is wrong has something to type"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc", "2"], "Give --distributed"),
        (["--distributed", "--timeout", "0"], "--timeout 0"),
        (["--distributed", "--nnodes", "2"], "Give --rdzv-endpoint"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_check_that_fails_does_not_end_the_others():
    def broken():
        yield fine("a", "seen")
        raise OSError("no such thing")

    found = list(run_checks([("b", broken), ("c", lambda: [fine("c", "seen")])]))
    assert statuses(found) == {"a": "fine", "b": "warning", "c": "fine"}
    assert "no such thing" in found[1].seen


# --------------------------------------------------------------------------- the software


def test_a_missing_and_an_old_package(monkeypatch):
    versions = {"torch": "1.0", "numpy": "2.0"}

    def version(name):
        if name not in versions:
            raise software.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(software, "version", version)
    lines = ["torch>=2.11,<2.14", "numpy>=1.26", "orjson>=3", "wandb; extra == 'wandb'"]
    monkeypatch.setattr(software, "requires", lambda name: lines)
    found = {finding.name: finding for finding in software.check_requirements()}
    assert found["torch"].status == found["orjson"].status == "wrong"
    assert "1.0, and Litespark needs" in found["torch"].seen
    assert found["orjson"].fix == "pip install 'orjson>=3'"
    assert not {"numpy", "wandb", "packages"} & found.keys()


def test_forgotten_variables(monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    (found,) = software.check_variables()
    assert found.status == "warning"
    assert found.fix == "unset NCCL_P2P_DISABLE"


# ---------------------------------------------------------------------------- the machine


def test_little_shared_memory(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    found = {finding.name: finding for finding in machine.check_memory()}
    assert found["shared memory"].status == "wrong"
    assert "--shm-size" in found["shared memory"].fix


def test_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (256, 1024))
    monkeypatch.setattr(machine, "_SYSFS_FABRICS", tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    found = {finding.name: finding for finding in machine.check_limits()}
    assert found["open files"].fix == "ulimit -n 1024"
    assert found["locked memory"].status == "wrong"
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: unlimited)
    assert statuses(machine.check_limits())["locked memory"] == "fine"


def test_adapters(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_SYSFS_FABRICS", tmp_path)
    (found,) = machine.check_fabric()
    assert "no InfiniBand or EFA" in found.seen
    drivers = tmp_path.parent / "drivers"
    for adapter, driver, state in (
        ("mlx5_0", "mlx5_core", "4: ACTIVE"),
        ("rdma0", "efa", "1: DOWN"),
    ):
        port = tmp_path / adapter / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec\n")
        (drivers / driver).mkdir(parents=True)
        (tmp_path / adapter / "device").mkdir()
        (tmp_path / adapter / "device" / "driver").symlink_to(drivers / driver)
    found = list(machine.check_fabric())
    assert [f.status for f in found] == ["wrong", "fine", "wrong"]
    assert "rdma0 port 1 is 1: DOWN" in found[0].seen
    assert "aws-ofi-nccl" in found[2].fix


def test_a_name_that_only_this_machine_knows(monkeypatch):
    monkeypatch.setattr(machine, "outward_address", lambda: "10.0.0.7")
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "localhost")
    found = {finding.name: finding for finding in machine.check_names()}
    assert found["own name"].status == "warning"
    assert "10.0.0.7 localhost" in found["own name"].fix
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "no-such-host.invalid")
    assert "cannot be resolved" in {f.name: f for f in machine.check_names()}["own name"].seen


def test_a_disk(tmp_path):
    assert statuses(machine.check_disk(tmp_path))["disk speed"] in ("fine", "warning")
    found = list(run_checks([("disk", lambda: machine.check_disk(tmp_path / "missing"))]))
    assert found[0].status == "warning"
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_stores_that_cannot_be_read():
    (found,) = stores.check_store("data/a.bin")
    assert found.status == "wrong"
    (found,) = stores.check_store("gs://bucket/a")
    assert "gs:// is not known" in found.seen


# -------------------------------------------------------------------------------- GPUs


class FakeNvml:
    """Two GPUs; what a test wants otherwise it sets."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
    NVML_NVLINK_MAX_LINKS = 18
    power = (700_000, 700_000)
    reasons = 0
    errors = 0
    used = 0
    links = (18, 18)

    def __getattr__(self, name):
        def answer(*arguments):
            limit, default = self.power
            return {
                "nvmlDeviceGetCount": 2,
                "nvmlDeviceGetHandleByIndex": arguments[0] if arguments else None,
                "nvmlDeviceGetEnforcedPowerLimit": limit,
                "nvmlDeviceGetPowerManagementDefaultLimit": default,
                "nvmlDeviceGetCurrentClocksEventReasons": self.reasons,
                "nvmlDeviceGetTotalEccErrors": self.errors,
                "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=self.used),
                "nvmlDeviceGetCpuAffinity": [0b10],
                "nvmlDeviceGetNvLinkState": (
                    int(arguments[1] < self.links[arguments[0]]) if len(arguments) > 1 else 0
                ),
            }.get(name)

        return answer


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    return fake


def test_healthy_gpus(nvml):
    (found,) = gpus.check_health()
    assert found.status == "fine"
    assert "2 GPUs" in found.seen
    (found,) = gpus.check_links()
    assert found.seen == "18 links up on each of 2 GPUs"


@pytest.mark.parametrize(
    ("fault", "words", "fix"),
    [
        ({"power": (500_000, 700_000)}, "capped at 500 W of 700 W", "nvidia-smi -i 0 -pl 700"),
        ({"reasons": 0x02}, "held at clocks", "nvidia-smi -i 0 -rgc"),
        ({"reasons": 0x40}, "because of heat", "PERFORMANCE"),
        ({"errors": 3}, "3 memory errors", "take the node out"),
        ({"used": 9 << 30}, "9216 MiB are in use", "nvidia-smi -i 0"),
    ],
)
def test_sick_gpus(nvml, fault, words, fix):
    vars(nvml).update(fault)
    found = list(gpus.check_health())
    assert [f.name for f in found] == ["GPU 0", "GPU 1"]
    assert words in found[0].seen
    assert fix in found[0].fix


def test_links_that_are_down(nvml):
    nvml.links = (18, 17)
    (found,) = gpus.check_links()
    assert found.status == "wrong"
    assert "GPU 1: 17" in found.seen
    nvml.links = (0, 0)
    (found,) = gpus.check_links()
    assert found.status == "warning"


def test_cores_far_from_the_gpus(nvml, monkeypatch):
    monkeypatch.setattr(gpus.os, "sched_getaffinity", lambda pid: {5})
    (found,) = gpus.check_numa()
    assert "no core next to GPU 0, 1" in found.seen
    monkeypatch.setattr(gpus.os, "sched_getaffinity", lambda pid: {1, 5})
    (found,) = gpus.check_numa()
    assert found.status == "fine"


# ---------------------------------------------------------------------- the nodes together


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
def test_all_pairs_meet_once(world_size):
    met = []
    for number in _distances(world_size):
        for rank in range(world_size):
            other = _partner(rank, number, world_size)
            assert _partner(other, number, world_size) == rank
            if rank < other:
                met.append((rank, other))
    pairs = [(a, b) for a in range(world_size) for b in range(a + 1, world_size)]
    assert sorted(met) == pairs


def test_many_ranks_meet_some():
    assert len(_distances(4096)) < 20


def table_of(speeds: dict[str, float], within: float = 10.0):
    """Two ranks a node; a link is as fast as the slower of its nodes."""
    hosts = [host for host in speeds for _ in range(2)]
    return [
        [
            NAN
            if a == b
            else within
            if hosts[a] == hosts[b]
            else min(speeds[hosts[a]], speeds[hosts[b]])
            for b in range(len(hosts))
        ]
        for a in range(len(hosts))
    ], hosts


def test_the_slow_node_is_named():
    table, hosts = table_of({"a": 3.0, "b": 3.0, "c": 0.5, "d": 3.2})
    found = judge_bandwidth(table, hosts)
    assert [(f.name, f.status) for f in found] == [
        ("bandwidth within nodes", "fine"),
        ("bandwidth between nodes", "wrong"),
    ]
    assert found[1].seen.startswith("c has 0.500 GB/s")


def test_equal_nodes_are_fine():
    table, hosts = table_of({"a": 3.0, "b": 2.9, "c": 3.1})
    assert {f.status for f in judge_bandwidth(table, hosts)} == {"fine"}
    table, hosts = table_of({"a": 3.0})
    assert [f.name for f in judge_bandwidth(table, hosts)] == ["bandwidth within nodes"]


def test_the_table_is_readable():
    table, hosts = table_of({"a": 3.0, "b": 0.5})
    lines = list(format_table(table, hosts))
    assert len(lines) == 5
    assert lines[1].split() == ["a", "0", "-", "10.00", "0.50", "0.50"]


def test_differences_are_grouped_by_host():
    facts = {"torch": "2.13", "python": "3.11"}
    ranks = [("a", facts), ("a", facts), ("b", facts | {"torch": "2.12"}), ("c", {"torch": "2.13"})]
    assert differences(ranks) == [
        "python is 3.11 on a, b; missing on c",
        "torch is 2.13 on a, c; 2.12 on b",
    ]
