"""`litespark doctor --distributed` over three hosts, of which one is slow, or two do not meet."""

from __future__ import annotations

import json
import subprocess
import sys

NAMES = ("node-a", "node-b", "node-c")


def examine(hosts, timeout: int = 60) -> tuple[list[int], dict[str, dict]]:
    """Exit codes of the nodes, and the findings of the first by name."""
    words = [sys.executable, "-m", "litespark", "doctor", "--distributed", "--json"]
    options = ["--timeout", str(timeout), "--nproc", "1", "--nnodes", "3"]
    started = [hosts.start(name, *words, *options, "--rdzv-endpoint", "node-a") for name in NAMES]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    text = outputs[0][outputs[0].index("[\n") : outputs[0].rindex("]") + 1]
    for name in NAMES:
        assert hosts.left_over(name) == []
    found = {finding["name"]: finding for finding in json.loads(text)}
    return [process.returncode for process in started], found


def on(hosts, name: str, *words: str) -> None:
    subprocess.run(["ip", "netns", "exec", f"{hosts.tag}-{name}", *words], check=True)


def test_equal_hosts(hosts):
    codes, found = examine(hosts(*NAMES))
    assert codes == [0, 0, 0], found
    assert {finding["status"] for finding in found.values()} == {"fine"}


def test_a_slow_host_is_named(hosts):
    network = hosts(*NAMES)
    shaping = ["root", "tbf", "rate", "50mbit", "burst", "64kb", "latency", "400ms"]
    on(network, "node-c", "tc", "qdisc", "add", "dev", "eth0", *shaping)
    codes, found = examine(network)
    assert codes == [1, 1, 1]
    assert found["bandwidth between nodes"]["seen"].startswith("node-c has")


def test_hosts_that_do_not_reach_each_other_are_named(hosts):
    network = hosts(*NAMES)
    for name, other in (("node-b", "node-c"), ("node-c", "node-b")):
        on(network, name, "ip", "route", "add", "blackhole", network.address(other))
    codes, found = examine(network)
    assert codes == [1, 1, 1]
    assert "cannot reach node-" in found["connections"]["seen"]
    assert "all-reduce" not in found, "which would hang"
