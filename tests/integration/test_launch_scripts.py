"""The scripts in launch/: what they refuse, in which words, and that they leave nothing behind.

The runs over several hosts that take longer are in tests/launch/.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from litespark.cli.main import parse
from litespark.config import load_config, validate
from tests.support import cli, hosts
from tests.support.runs import config_tree, write_shard
from tests.support.watching import losses, resumed
from tools.free_port import free_port

LAUNCH = cli.ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), *sorted(LAUNCH.glob("*.sbatch"))]
needs_hosts = pytest.mark.skipif(hosts.why_not() is not None, reason=hosts.why_not() or "")


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        timeout=cli.PATIENCE_SECONDS,
        env=cli.environment() | {"PYTHON": sys.executable, "PYTHONPATH": str(cli.ROOT)} | variables,
        cwd=cli.ROOT,
    )


@pytest.fixture
def config(tmp_path) -> str:
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["model"]["num_layers"] = 2
    tree["training"] = {"steps": 8, "save_every": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


# --------------------------------------------------------------------------- the files


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    """shellcheck (the extra dev brings it) finds nothing, and follows what is sourced."""
    checker = Path(sys.executable).with_name("shellcheck")
    assert checker.exists(), "pip install 'litespark[dev]'"
    found = subprocess.run(
        [str(checker), "-x", "--source-path=SCRIPTDIR/..", str(script)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


def test_every_variable_that_is_set_is_explained():
    lines = (LAUNCH / "env.sh").read_text().splitlines()
    exports = [number for number, line in enumerate(lines) if line.strip().startswith("export ")]
    assert exports
    for number in exports:
        name = lines[number].split("export ")[1].split("=")[0]
        above = "\n".join(lines[max(0, number - 8) : number])
        assert "#" in above, f"{name} is not explained"
    assert not any("export NCCL_NVLS_ENABLE" in line for line in lines)


@pytest.fixture(scope="module")
def rendered() -> list[dict]:
    """The example overlay, as kustomize renders it; without kubectl, the base below it."""
    if shutil.which("kubectl") is None:
        job = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
        return [job]
    words = ["kubectl", "kustomize", str(LAUNCH / "overlays" / "p5")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def test_a_pod_runs_the_same_command(rendered):
    (job,) = [entry for entry in rendered if entry["kind"] == "PyTorchJob"]
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "litespark"]
    assert container["name"] == "pytorch", "what the operator looks for"
    replaced = {
        "$(PET_NNODES)": "1:2",
        "$(PET_NPROC_PER_NODE)": job["spec"]["nprocPerNode"],
        "$(PET_RDZV_ENDPOINT)": "litespark-worker-0:29500",
        "$(PET_MAX_RESTARTS)": str(job["spec"]["elasticPolicy"]["maxRestarts"]),
    }
    words = container["args"]
    for name, value in replaced.items():
        words = [word.replace(name, value) for word in words]
    assert "$" not in "".join(words)
    args = parse(words)
    assert (args.nnodes, args.nproc, args.max_restarts) == ("1:2", 8, 10)
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert args.config == f"{mounted['run']}/run.yaml"


def test_the_overlays_run_is_valid_with_one_node_and_with_two():
    config = load_config(LAUNCH / "overlays" / "p5" / "run.yaml")
    assert validate(config, 8) == []
    assert validate(config, 16) == []


# ------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("local.sh", [], "the following arguments are required: CONFIG"),
        ("local.sh", ["no-such.yaml"], "no-such.yaml: cannot be read"),
        ("torchrun_multinode.sh", [], "By hand, the same command typed on every node"),
        ("torchrun_multinode.sh", ["run.yaml"], "--nnodes is missing"),
        ("torchrun_multinode.sh", ["--hosts"], "--hosts needs HOST,HOST"),
        ("torchrun_multinode.sh", ["--hosts", "a,b,a", "run.yaml"], "--hosts names a twice"),
        ("torchrun_multinode.sh", ["run.yaml", "--hosts", "a,b"], "--hosts comes before"),
        (
            "torchrun_multinode.sh",
            ["--nnodes", "0", "--rdzv-endpoint", "a", "run.yaml"],
            "--nnodes 0: is no number of nodes",
        ),
        ("slurm.sbatch", ["run.yaml"], "submit this file with sbatch"),
        ("hyperpod.sbatch", ["run.yaml"], "submit this file with sbatch"),
    ],
)
def test_mistakes(script, arguments, words):
    ended = run(script, *arguments)
    assert ended.returncode != 0
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_python():
    ended = run("local.sh", "run.yaml", PYTHON="no-such-python")
    assert ended.returncode == 2
    assert "there is no no-such-python on" in ended.stderr


def test_arguments_arrive_unchanged(config):
    """Words with spaces, overrides before and after options, the number of processes."""
    words = [config, "run.name=two words", "--dry-run", "--nproc", "4", "data.split=[90, 10, 0]"]
    ended = run("local.sh", *words)
    assert ended.returncode == 0, ended.stderr
    assert "name: two words" in ended.stdout
    assert "4 processes: TP1 x CP1 x DP4 x PP1" in ended.stdout


def test_a_busy_port(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--nnodes", "2", "--rdzv-endpoint", endpoint]
        ended = run("torchrun_multinode.sh", *options, config)
    assert ended.returncode == 2
    assert "is taken by another process" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_node_that_waits_in_vain(config):
    """This node is where all meet, and nobody comes."""
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--nnodes", "4", "--rdzv-endpoint", endpoint, "--join-timeout", "3"]
    ended = run("torchrun_multinode.sh", *options, config)
    assert ended.returncode == 1
    assert "found no place among 4 nodes" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---------------------------------------------------------------------------- two hosts


@pytest.fixture
def network(tmp_path) -> Iterator[hosts.Hosts]:
    with hosts.hosts(tmp_path, "node-a", "node-b") as made:
        yield made


def start(network: hosts.Hosts, name: str, *arguments: str, **variables: str):
    script = str(LAUNCH / "torchrun_multinode.sh")
    options = [
        "--nproc",
        "1",
        "--rdzv-endpoint",
        "node-a",
        "--join-timeout",
        "300",
        "--lost-after",
        "30",
    ]
    return network.start(name, script, *options, *arguments, **variables)


@needs_hosts
@pytest.mark.distributed
def test_an_unreachable_master(network, config):
    network.cut("node-b")
    options = ["--nnodes", "2", "--rdzv-endpoint", "node-a", "--join-timeout", "2"]
    process = network.start("node-b", str(LAUNCH / "torchrun_multinode.sh"), *options, config)
    said, _ = process.communicate(timeout=cli.PATIENCE_SECONDS)
    assert process.returncode == 1
    assert "node-b cannot reach node-a:29500" in said
    assert "Traceback" not in said
    assert network.left_over("node-b") == []


@needs_hosts
@pytest.mark.distributed
def test_two_hosts_with_different_numbers_of_nodes(network, config):
    """The second to come waits for two more: both end at once, and say why."""
    numbers = {"node-a": "2", "node-b": "4"}
    started = [start(network, name, "--nnodes", n, config) for name, n in numbers.items()]
    for process in started:
        said, _ = process.communicate(timeout=cli.PATIENCE_SECONDS)
        assert process.returncode == 2, said
        # In the order in which they came.
        both = "2 on node-a, 4 on node-b", "4 on node-b, 2 on node-a"
        assert any(f"--nnodes: differs: {order}. Type the same" in said for order in both), said
        assert "Traceback" not in said
    for name in network.names:
        assert network.left_over(name) == []


@needs_hosts
@pytest.mark.distributed
def test_two_hosts_with_different_configurations(network, config):
    """Both say what differs, and on which host."""
    nodes = ["--nnodes", "2"]
    started = [
        start(network, "node-a", *nodes, config),
        start(network, "node-b", *nodes, config, "training.steps=9"),
    ]
    said = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert "training.steps is 8 on node-a; 9 on node-b" in said[0]
    assert "node-b: ended by a mistake, which node-a names" in said[1]
    for name in network.names:
        assert network.left_over(name) == []


@needs_hosts
@pytest.mark.distributed
def test_a_run_survives_the_loss_of_a_host(network, config, tmp_path):
    """Data parallel over two hosts, then on one; the losses are those of a run of one process."""
    go_on, folder = tmp_path / "full-speed", tmp_path / "run"
    faults = cli.ROOT / "tests" / "support" / "faults"
    variables = {"PYTHONPATH": f"{faults}:{cli.ROOT}", "PACE_UNTIL": str(go_on)}
    options = ["--nnodes", "1:2", "--max-restarts", "1", config]
    survivor = start(network, "node-a", *options, **variables)
    start(network, "node-b", *options, **variables)
    # The save of step 4 waits for that of step 2, which is there to go on from.
    hosts.wait_until(lambda: len(losses(folder)) >= 5, 300, "step 5")
    network.power_off("node-b")
    go_on.touch()
    said, _ = survivor.communicate(timeout=500)
    assert survivor.returncode == 0, said
    assert "2 nodes of 1:2, 2 ranks: node-a, node-b" in said
    assert "1 node of 1:2, 1 ranks: node-a; lost: node-b" in said
    assert [detail.partition(",")[0] for detail in resumed(folder)] == ["TP1 x CP1 x DP1 x PP1"]
    alone = cli.run("train", config, f"run.output_dir={tmp_path}/alone", OMP_NUM_THREADS="1")
    assert alone.returncode == 0, alone.stderr
    assert losses(folder) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert os.listdir(folder / "checkpoints")
