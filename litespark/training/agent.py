"""One node's part in a run on several: its agent meets the others' and starts the ranks here.

It is torchrun's agent (`torch.distributed.elastic`) with its c10d rendezvous, and differs in what
runs of days need:

- Nodes are numbered by `--node-rank`, or in the natural order of their names, so that the same
  nodes have the same ranks at every start, and neighbours in a rack stay neighbours.
- A node's address is that of its route to the others, not what its name resolves to.
- Every start has a key-value store of its own.  torchrun's is used again after a node has come or
  gone, with all that the ranks of before have left in it.
- A mistake of the user's, or a guard that would end the run again, is not started again.
- Who came, who is missing and why it ends is said in a line, not in a traceback.

When a node is lost, the ranks of the others fail.  Their agents meet again, without the lost one
once its heartbeats have been missing for `--lost-after`, and start at the new size from the newest
checkpoint.  When a node comes, the others stop their ranks, which save, and start with it.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from litespark.errors import ExitCode, LitesparkError
from litespark.parallel.nodes import Member, NodeOptions, check_members, reachable_members
from litespark.training.launch import (
    code_after_signal,
    ended_with,
    how_it_ended,
    prepare_agent,
)
from litespark.training.node_agreement import NodeAgreement
from litespark.utils.network import (
    address_towards,
    check_port_free,
    is_own_address,
    resolve,
    wait_for_port,
)

_LAST_CALL_SECONDS = 10.0  # how long the others may take once MIN nodes are there
# Between two heartbeats of a node.  Not less: on a busy machine one takes torch a second, and its
# agent comes to nothing else when the next is always due (seen with 1 s, at a load of 60).
_HEARTBEAT_SECONDS = 5
_LAST_WORDS_SECONDS = 10.0  # for the ranks here, when the meeting place is gone
_MEETING_LOST = (RendezvousConnectionError, DistNetworkError)
_NAME_SECONDS = 20.0  # until a pod's name is in Kubernetes' DNS


def run_node(
    nodes: NodeOptions,
    num_processes: int,
    arguments: Sequence[str],
    run_folder: Path,
    *,
    max_restarts: int,
) -> int:
    """Run `python -m litespark ARGUMENTS` in `num_processes` ranks here; returns the exit code.

    Raises:
        UserError: the nodes cannot meet as they were told to, or were started differently.
        LitesparkError: the others cannot be reached, or did not come.
    """
    prepare_agent()
    events = run_folder / "events.jsonl"
    while True:
        spec, own, agreement = _place(nodes, num_processes, arguments, max_restarts)
        try:
            agreement.check(end_for_all=spec.rdzv_handler.shutdown)
            return _run_agent(NodeAgent(spec, nodes, own, agreement, events))
        except _MEETING_LOST:
            here = socket.gethostname()
            if not nodes.is_elastic or max_restarts == 0:
                raise LitesparkError(
                    f"{here} has lost {nodes.host}, where the nodes meet; start the run again, it "
                    "resumes from its newest checkpoint"
                ) from None
        # The others go on without this node, or will: it comes back as a new one.
        max_restarts -= 1
        _say(f"{here}: has lost {nodes.host}, where the nodes meet; waiting for it to come back")


def _place(
    nodes: NodeOptions, num_processes: int, arguments: Sequence[str], max_restarts: int
) -> tuple[WorkerSpec, Member, NodeAgreement]:
    """What this node is to do, and as what it introduces itself; the others can be reached."""
    meeting, address, is_host = find_own_place(nodes)
    here = socket.gethostname()
    try:
        handler, agreement = _rendezvous_handler(nodes, address, is_host=is_host)
    except RendezvousError as error:
        raise LitesparkError(f"{here}: {nodes.host}:{nodes.port}: {_root(error)}") from None
    spec = WorkerSpec(
        role="default",
        local_world_size=num_processes,
        entrypoint=sys.executable,
        args=("-m", "litespark", *arguments),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr=address,
    )
    own = Member(
        name=here,
        address=address,
        meeting=meeting,
        num_processes=num_processes,
        node_rank=nodes.node_rank,
    )
    return spec, own, agreement


def _run_agent(agent: NodeAgent) -> int:
    """The exit code of this node's ranks, when the run has ended here.

    Raises:
        RendezvousConnectionError, DistNetworkError: the place where the nodes meet is lost.
        UserError, LitesparkError: see `run_node`.
    """
    leaves_for_good = True
    try:
        result: Any = agent.run()
    except SignalException as error:
        leaves_for_good = False  # the others may go on without this node
        return code_after_signal(error.sigval, agent.events, agent.started)
    except RendezvousTimeoutError:
        raise LitesparkError(_nobody_came(agent.nodes)) from None
    except _MEETING_LOST:
        leaves_for_good = False
        raise
    except RendezvousClosedError:
        agent.agreement.raise_if_known()
        raise LitesparkError(
            f"{socket.gethostname()}: the run was ended on another node; its last lines say why"
        ) from None
    finally:
        if leaves_for_good:
            agent.handler.shutdown()
    return agent.exit_code(result)


def find_own_place(nodes: NodeOptions) -> tuple[str, str, bool]:
    """The address where the nodes meet, this node's own, and whether they meet here.

    Raises:
        UserError: the meeting place has no known name, or its port is taken.
        LitesparkError: it cannot be reached.
    """
    meeting = resolve(nodes.host, min(nodes.join_seconds, _NAME_SECONDS))
    if is_own_address(meeting):
        check_port_free(meeting, nodes.port)
        return meeting, nodes.address or meeting, True
    address = nodes.address or address_towards(meeting)
    wait_for_port(nodes.host, nodes.port, nodes.join_seconds, _say)
    return meeting, address, False


def _rendezvous_handler(
    nodes: NodeOptions, address: str, *, is_host: bool
) -> tuple[RendezvousHandler, NodeAgreement]:
    host = f"[{nodes.host}]" if ":" in nodes.host else nodes.host
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{host}:{nodes.port}",
        run_id=nodes.run_id,
        min_nodes=nodes.minimum,
        max_nodes=nodes.maximum,
        local_addr=address,
        is_host=is_host,
        join_timeout=max(1, round(nodes.join_seconds)),
        last_call_timeout=round(_LAST_CALL_SECONDS),
        keep_alive_interval=_HEARTBEAT_SECONDS,
        keep_alive_max_attempt=round(nodes.lost_seconds / _HEARTBEAT_SECONDS),
    )
    backend, store = create_backend(parameters)
    return create_handler(store, backend, parameters), NodeAgreement(store, nodes)


class NodeAgent(LocalElasticAgent):
    """torchrun's agent, with the differences that the module's docstring lists."""

    def __init__(
        self,
        spec: WorkerSpec,
        nodes: NodeOptions,
        own: Member,
        agreement: NodeAgreement,
        events: Path,
    ) -> None:
        super().__init__(spec=spec, logs_specs=DefaultLogsSpecs())
        self.nodes, self.own, self.agreement, self.events = nodes, own, agreement, events
        self.handler, self.max_restarts = spec.rdzv_handler, spec.max_restarts
        self.handler.num_nodes_waiting = self._patiently(self.handler.num_nodes_waiting)
        self.started = time.time()
        self.members: list[Member] = []
        self.ranks_store: TCPStore | None = None

    def _patiently(self, num_nodes_waiting: Callable[[], int]) -> Callable[[], int]:
        """Take the loss of the meeting place for no news at first.

        The node that holds it may have ended a moment before this one's ranks do, which know why.
        """
        lost_since: float | None = None

        def patient() -> int:
            nonlocal lost_since
            try:
                waiting, lost_since = num_nodes_waiting(), None
            except RendezvousConnectionError:
                lost_since = time.monotonic() if lost_since is None else lost_since
                if time.monotonic() - lost_since > _LAST_WORDS_SECONDS:
                    raise
                return 0
            return waiting

        return patient

    def exit_code(self, result: RunResult | None) -> int:
        """How this node's ranks ended, after the message that none of them could give."""
        if result is None:  # torch's word for a run that was over before this node came to it
            raise LitesparkError(f"{socket.gethostname()}: the run ended without this node")
        if not result.is_failed():
            return ExitCode.DONE
        rank, code = _first_failure(result)
        first, here = self.members[0].name, self.own.name
        if code == ExitCode.USER_ERROR and here != first:  # the first rank speaks for all
            _say(f"{here}: ended by a mistake, which {first} names if nothing here does")
        if code in set(ExitCode):
            return code
        if self._hangs():
            return ExitCode.ENDED_BY_GUARD
        _say(f"error: rank {rank} on {here} {how_it_ended(code)}")
        return ExitCode.FAILED

    # torch's methods are wrapped by an untyped decorator, which hides their signatures.
    def _rendezvous(self, worker_group: Any) -> None:  # type: ignore[override]
        """Meet the other nodes, agree on their order, and number the ranks of this one."""
        spec = worker_group.spec
        self.started = time.time()
        self.ranks_store = None  # with all that the last start's ranks wrote there
        meeting = spec.rdzv_handler.next_rendezvous()
        self.agreement.mark_running()
        store = meeting.store  # its keys belong to this meeting alone
        store.set(f"litespark/member/{meeting.rank}", json.dumps(asdict(self.own)))
        introduced = [
            Member(**json.loads(store.get(f"litespark/member/{number}")))
            for number in range(meeting.world_size)
        ]
        check_members(introduced)
        order = sorted(range(meeting.world_size), key=lambda i: introduced[i].sort_key())
        members = reachable_members([introduced[number] for number in order])
        group_rank = order.index(meeting.rank)
        if group_rank == 0:
            self.ranks_store = TCPStore(members[0].address, 0, None, True, wait_for_workers=False)
            self._tell_members(members)
            store.set("litespark/ranks_port", str(self.ranks_store.port))
        self.members = members
        self._store = store
        worker_group.store = store
        worker_group.group_rank = group_rank
        worker_group.group_world_size = meeting.world_size
        worker_group.master_addr = members[0].address
        worker_group.master_port = int(store.get("litespark/ranks_port"))
        number_ranks: Any = self._assign_worker_ranks
        worker_group.workers = number_ranks(store, group_rank, meeting.world_size, spec)

    def _monitor_workers(self, worker_group: Any) -> RunResult:  # type: ignore[override]
        """Look at the ranks; a failure that a new start would repeat uses up all restarts."""
        look: Any = super()._monitor_workers
        result: RunResult = look(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        rank, code = _first_failure(result)
        if not self._is_worth_a_restart(code):
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            number = self.max_restarts - self._remaining_restarts + 1
            _say(
                f"{socket.gethostname()}: rank {rank} {how_it_ended(code)}; restart {number} of "
                f"{self.max_restarts}, meeting the other nodes at {self.nodes.host}:"
                f"{self.nodes.port}"
            )
        return result

    def _is_worth_a_restart(self, code: int) -> bool:
        """Whether a rank's exit code stands for a fault, or for another node that leaves."""
        if code == ExitCode.ENDED_BY_GUARD:
            return self._hangs()
        if code == ExitCode.STOPPED_BY_SIGNAL:
            return self.nodes.is_elastic
        return code not in (ExitCode.DONE, ExitCode.USER_ERROR)

    def _hangs(self) -> bool:
        return ended_with("hang", self.events, self.started)

    def _tell_members(self, members: list[Member]) -> None:
        """Say who takes part, and what has changed since this node's last start."""
        names = [member.name for member in members]
        before = [member.name for member in self.members]
        changes = "".join(
            f"; {word}: {', '.join(changed)}"
            for word, changed in (
                ("lost", [name for name in before if name not in names]),
                ("new", [name for name in names if before and name not in before]),
            )
            if changed
        )
        processes = sum(member.num_processes for member in members)
        count = f"{len(names)} node{'s' if len(names) > 1 else ''}"
        _say(f"{count} of {self.nodes.range_text}, {processes} ranks: {', '.join(names)}{changes}")


def _first_failure(result: RunResult) -> tuple[int, int]:
    rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
    return rank, failure.exitcode


def _nobody_came(nodes: NodeOptions) -> str:
    return (
        f"{socket.gethostname()}: found no place among {nodes.range_text} nodes at "
        f"{nodes.host}:{nodes.port} within {nodes.join_seconds:g} s: "
        f"fewer than {nodes.minimum} came, or {nodes.maximum} others are running. "
        "Look at whether the command runs on every node, with the same --nnodes and --rdzv-id"
    )


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0]


def _say(words: str) -> None:
    sys.stderr.write(f"litespark: {words}\n")
    sys.stderr.flush()
