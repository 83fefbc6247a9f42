"""What nodes are told about each other, what they find out, and when they refuse."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from litespark.errors import LitesparkError, UserError
from litespark.parallel.nodes import (
    Member,
    NodeOptions,
    check_members,
    parse_endpoint,
    parse_node_range,
    reachable_members,
)
from litespark.training import same_everywhere
from litespark.training.node_agreement import NodeAgreement
from litespark.training.same_everywhere import check_same_everywhere
from litespark.utils import network
from litespark.utils.facts import code_facts
from tests.support import cli
from tests.support.configs import loader


def member(name: str, **values) -> Member:
    given = {
        "name": name,
        "address": "10.0.0.9",
        "meeting": "10.0.0.1",
        "num_processes": 8,
        "node_rank": None,
    }
    return Member(**(given | values))


@pytest.mark.parametrize(("text", "found"), [("1", (1, 1)), ("16", (16, 16)), ("1:4", (1, 4))])
def test_node_ranges(text, found):
    assert parse_node_range(text) == found


@pytest.mark.parametrize("text", ["", "0", "4:1", "0:2", "1:", ":2", "two", "1:2:3", "-1", "1.5"])
def test_no_node_ranges(text):
    with pytest.raises(UserError, match="--nnodes"):
        parse_node_range(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node0", ("node0", 29500)),
        ("node0:1234", ("node0", 1234)),
        ("10.0.0.1:1234", ("10.0.0.1", 1234)),
        ("[fd00::1]:1234", ("fd00::1", 1234)),
        ("[fd00::1]", ("fd00::1", 29500)),
    ],
)
def test_endpoints(text, found):
    assert parse_endpoint(text) == found


@pytest.mark.parametrize("text", ["", "node0:", ":1234", "node0:0", "node0:70000", "a b", "a:b:c"])
def test_no_endpoints(text):
    with pytest.raises(UserError, match="--rdzv-endpoint"):
        parse_endpoint(text)


def test_nodes_stand_in_natural_order_or_as_numbered():
    names = ["gpu-10", "gpu-9", "gpu-2", "cpu-1", "rack2-gpu-1", "gpu"]
    nodes = sorted(map(member, names), key=Member.sort_key)
    assert [node.name for node in nodes] == [
        "cpu-1", "gpu", "gpu-2", "gpu-9", "gpu-10", "rack2-gpu-1",
    ]  # fmt: skip
    numbered = [member("a", node_rank=1), member("b", node_rank=0)]
    assert [node.name for node in sorted(numbered, key=Member.sort_key)] == ["b", "a"]


def test_the_meeting_place_is_known_by_what_the_others_call_it():
    """On Debian a machine's own name is 127.0.1.1 to itself."""
    nodes = [
        member("a", address="127.0.1.1", meeting="127.0.1.1"),
        member("b", address="10.0.0.2", meeting="10.0.0.1"),
    ]
    assert [node.address for node in reachable_members(nodes)] == ["10.0.0.1", "10.0.0.2"]
    alone = [member("a", address="127.0.1.1", meeting="127.0.1.1")]
    assert reachable_members(alone) == alone


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"num_processes": 4}, ["--nproc", "8 on a", "4 on b"]),
        ({"node_rank": 1}, ["--node-rank", "none on a", "given on b"]),
    ],
)
def test_nodes_that_were_started_differently(difference, words):
    with pytest.raises(UserError) as caught:
        check_members([member("a"), member("b", **difference)])
    for word in words:
        assert word in str(caught.value)


def test_two_nodes_of_one_number():
    with pytest.raises(UserError, match="given to a and to b"):
        check_members([member("a", node_rank=0), member("b", node_rank=0)])
    check_members([member("a", node_rank=0), member("b", node_rank=1)])


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*is taken"):
            network.check_port_free("127.0.0.1", port)
        network.wait_for_port("127.0.0.1", port, 1.0, pytest.fail)
    network.check_port_free("127.0.0.1", port)


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr(network, "_PATIENCE_SECONDS", 0.0)  # told at the first look
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        told = []
        with pytest.raises(LitesparkError, match=f"cannot reach 127.0.0.1:{port}.*refused"):
            network.wait_for_port("127.0.0.1", port, 3.0, told.append)
    assert len(told) == 1
    assert "waiting for" in told[0]


def test_own_addresses():
    assert network.is_own_address("127.0.0.1")
    assert not network.is_own_address("192.0.2.1")
    assert network.interface_of(network.address_towards("127.0.0.1")) == "lo"
    with pytest.raises(UserError, match="no-such-host"):
        network.resolve("no-such-host.invalid")


def answers_of(*ranks):
    """`gather` as rank 0 of these ranks sees it: their hosts and facts, in two exchanges."""
    exchanges = iter(zip(*ranks, strict=True))
    return lambda own: list(next(exchanges))


def exchanged(config, host, change=None):
    """What a rank on `host` would send; `change` edits its facts."""
    sent = []

    class Stop(Exception):
        pass

    def gather(value):
        sent.append(value)
        if len(sent) == 2:
            raise Stop
        return [value, ("elsewhere", dict.fromkeys(value[1], "other"))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_everywhere.socket, "gethostname", lambda: host)
        if change is not None:
            patch.setattr(same_everywhere, "code_facts", lambda: change(code_facts()))
        with pytest.raises(Stop):
            check_same_everywhere(config, gather)
    return sent


def test_other_code_and_other_configurations_are_named(tmp_path):
    load = loader(tmp_path)
    one = exchanged(load(), "node-a")
    check_same_everywhere(load(), answers_of(one, exchanged(load(), "node-b")))

    other = exchanged(load("training.steps=20"), "node-b")
    with pytest.raises(UserError) as caught:
        check_same_everywhere(load(), answers_of(one, other, other))
    assert "training.steps is 10 on node-a; 20 on node-b." in str(caught.value)
    assert caught.value.on_every_rank

    changed = exchanged(
        load(), "node-b", lambda facts: facts | {"litespark/training/step.py": "another"}
    )
    with pytest.raises(UserError) as caught:
        check_same_everywhere(load(), answers_of(one, one, changed))
    assert "code: not the same" in str(caught.value)
    assert "litespark/training/step.py is" in str(caught.value)
    assert "another on node-b" in str(caught.value)


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    """Two ranks as threads, each with its own view of the run's folder."""
    monkeypatch.setattr(same_everywhere, "_FOLDER_SECONDS", 0.3)
    monkeypatch.setattr(
        same_everywhere.socket, "gethostname", lambda: threading.current_thread().name
    )
    meeting, values = threading.Barrier(2), {}

    def look(is_first: bool, folder: Path) -> str:
        def gather(value):
            values[is_first] = value
            meeting.wait(10)
            answers = [values[True], values[False]]
            meeting.wait(10)
            return answers

        try:
            same_everywhere.check_same_folder(folder, is_first=is_first, gather=gather)
        except UserError as error:
            return str(error)
        return "the same"

    for other, words in (
        (tmp_path / "one", "the same"),
        (tmp_path / "two", "is another folder on node-b than on node-a"),
    ):
        folders = {"node-a": tmp_path / "one", "node-b": other}
        said: dict[str, str] = {}

        def rank(folders=folders, said=said) -> None:
            name = threading.current_thread().name
            folders[name].mkdir(exist_ok=True)
            said[name] = look(name == "node-a", folders[name])

        threads = [threading.Thread(target=rank, name=name) for name in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(words in text for text in said.values()), said
        assert list(folders["node-a"].iterdir()) == [], "nothing is left"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nnodes", "2"], ["--nnodes 2", "Give --rdzv-endpoint"]),
        (["--nnodes", "two", "--rdzv-endpoint", "a"], ["--nnodes two", "is no number of nodes"]),
        (["--rdzv-endpoint", "a"], ["--rdzv-endpoint a", "Give --nnodes"]),
        (["--nnodes", "2", "--rdzv-endpoint", "a:b"], ["is no HOST:PORT"]),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "a", "--node-rank", "2"],
            ["--node-rank 2", "from 0 to 1"],
        ),
        (
            ["--nnodes", "1:2", "--rdzv-endpoint", "a", "--node-rank", "0"],
            ["--node-rank 0", "Leave it out"],
        ),
    ],
)
def test_mistakes_in_the_options(arguments, words, tmp_path, capsys):
    from litespark.cli.main import main

    loader(tmp_path)
    assert main(["train", str(tmp_path / "run.yaml"), *arguments]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_more_nodes_than_the_batch_divides_by(tmp_path, caplog):
    from litespark.cli.launching import LaunchOptions, check_restarts

    def options(maximum, restarts=0):
        return LaunchOptions(False, 1, 1, restarts, NodeOptions(1, maximum, "a", 1))

    load = loader(tmp_path)
    with pytest.raises(UserError, match=r"batch\.global"):
        check_restarts(load(), options(3))
    check_restarts(load(), options(4))
    assert "with 3 nodes this run cannot go on" in caplog.text
    with pytest.raises(UserError, match="lets no restart go on"):
        check_restarts(load("run.resume=never"), options(2, restarts=1))


def test_under_torchrun_the_nodes_are_torchruns(tmp_path):
    loader(tmp_path)
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    arguments = ["train", str(tmp_path / "run.yaml"), "--nnodes", "2", "--rdzv-endpoint", "a"]
    ended = cli.run(*arguments, **variables)
    assert ended.returncode == 2
    assert "Leave out --nnodes under torchrun" in ended.stderr


# ------------------------------------------------------------------------------ the agent


def test_torchs_agent_is_what_ours_was_written_for():
    """`NodeAgent` replaces two of its methods, and uses these names, which torch may change."""
    import inspect

    from torch.distributed.elastic.agent.server import api
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    run = inspect.getsource(api.SimpleElasticAgent._invoke_run)
    for name in ("self._monitor_workers(", "self._remaining_restarts", "num_nodes_waiting"):
        assert name in run
    meet = inspect.getsource(api.SimpleElasticAgent._rendezvous)
    for name in (
        "next_rendezvous()",
        "self._store = store",
        "self._assign_worker_ranks(",
        *(
            f"worker_group.{name} ="
            for name in (
                *("workers", "store", "group_rank", "group_world_size"),
                *("master_addr", "master_port"),
            )
        ),
    ):
        assert name in meet, name
    assert "self._rendezvous(" in inspect.getsource(api.SimpleElasticAgent._initialize_workers)
    assert "_monitor_workers" in vars(LocalElasticAgent)


@pytest.mark.parametrize(
    ("code", "elastic", "event", "expected"),
    [
        (1, False, "", True),  # a fault
        (-9, False, "", True),
        (-9, True, "", True),
        (2, True, "", False),  # a mistake is not started again
        (4, True, "", False),  # nor what a guard has ended
        (4, False, "hang", True),  # but for a hang
        (3, False, "", False),  # told to stop
        (3, True, "", True),  # another node was, and leaves
    ],
)
def test_what_is_started_again(code, elastic, event, expected):
    from litespark.training.agent import NodeAgent

    agent = NodeAgent.__new__(NodeAgent)
    agent.nodes = NodeOptions(1, 2 if elastic else 1, "a", 1)
    agent._hangs = lambda: event == "hang"
    assert agent._is_worth_a_restart(code) is expected


def test_who_came_and_who_is_missing(capsys):
    from litespark.training.agent import NodeAgent

    agent = NodeAgent.__new__(NodeAgent)
    agent.nodes = NodeOptions(1, 2, "a", 1)
    agent.members = []
    for names, words in (
        (["a", "b"], "2 nodes of 1:2, 16 ranks: a, b\n"),
        (["a"], "1 node of 1:2, 8 ranks: a; lost: b\n"),
        (["a", "c"], "2 nodes of 1:2, 16 ranks: a, c; new: c\n"),
    ):
        members = [member(name) for name in names]
        agent._tell_members(members)
        assert capsys.readouterr().err == f"litespark: {words}"
        agent.members = members


def test_gloo_listens_where_the_others_are(monkeypatch):
    """Where the first rank's own name is a loopback address to itself, on its way out."""
    from litespark.parallel import groups

    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    groups.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"

    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(groups, "outward_address", lambda: "10.0.0.7")
    monkeypatch.setattr(groups, "interface_of", {"10.0.0.7": "eth7", "10.0.0.8": "eth8"}.get)
    groups.choose_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "eth7"
    monkeypatch.setattr(groups, "address_towards", lambda address: "10.0.0.8")
    groups.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth8"


def test_the_loss_of_the_meeting_place_is_no_news_at_first(monkeypatch):
    """Torch's agent asks ten times a second; the ranks here may be about to say why."""
    from litespark.training import agent as module
    from litespark.training.agent import NodeAgent, RendezvousConnectionError

    answers = iter([1, "lost", "lost", 0, "lost", "lost"])

    def ask() -> int:
        answer = next(answers)
        if answer == "lost":
            raise RendezvousConnectionError
        return answer

    clock = iter([0.0, 0.0, 5.0, 100.0, 100.0, 111.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    patient = NodeAgent._patiently(NodeAgent.__new__(NodeAgent), ask)
    assert [patient() for _ in range(5)] == [1, 0, 0, 0, 0]
    with pytest.raises(RendezvousConnectionError):
        patient()


def test_nodes_agree_on_their_number():
    """Before the run one that differs ends it for all; once it is on, it ends alone."""
    store, ended = HashStore(), []
    agreements = {
        text: NodeAgreement(store, NodeOptions(*parse_node_range(text), host="a", port=1))
        for text in ("2", "1:2", "3")
    }
    agreements["2"].check(lambda: ended.append("2"))
    agreements["2"].check(lambda: ended.append("2"))  # a second node that was told the same
    agreements["2"].raise_if_known()
    with pytest.raises(UserError, match=r"--nnodes: differs: 2 on .*, 1:2 on .*\. Type the same"):
        agreements["1:2"].check(lambda: ended.append("1:2"))
    assert ended == ["1:2"]
    with pytest.raises(UserError, match=r"differs: 2 on .*, 1:2 on "):
        agreements["2"].raise_if_known()
    agreements["2"].mark_running()
    with pytest.raises(UserError, match=r"differs: 2 on .*, 3 on "):
        agreements["3"].check(lambda: ended.append("3"))
    assert ended == ["1:2"]
    other_job = NodeOptions(3, 3, host="a", port=1, run_id="other")
    NodeAgreement(store, other_job).check(lambda: ended.append("other"))
