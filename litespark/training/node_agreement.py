"""Whether all nodes were told the same `--nnodes`, asked before they meet.

torch's rendezvous has each node count by its own number: told 2 and 3, two nodes can wait for each
other until the join timeout, and neither learns why.  So the first to come says its number in the
store where they meet, and whoever was told another ends at once.  If nothing runs yet the others
end with the same words; if the run is on, only the one that came wrongly does.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

from torch._C._distributed_c10d import Store

from litespark.errors import UserError
from litespark.parallel.nodes import NodeOptions


class NodeAgreement:
    """What this node's `--nnodes` is held against.

    Args:
        store: where the nodes meet.
        nodes: what this node was told.
    """

    def __init__(self, store: Store, nodes: NodeOptions) -> None:
        self._store, self._nodes = store, nodes
        self._keys = {
            name: f"litespark/{nodes.run_id}/nnodes/{name}" for name in ("said", "differs", "runs")
        }

    def check(self, end_for_all: Callable[[], object]) -> None:
        """Say this node's number, if it is the first, else compare it.

        Args:
            end_for_all: called before the error is raised, where the run has not begun.

        Raises:
            UserError: another node was told another number.
        """
        own = [self._nodes.range_text, socket.gethostname()]
        said = self._store.compare_set(self._keys["said"], "", json.dumps(own))
        first = json.loads(said)
        if first[0] == own[0]:
            return
        problem = f"differs: {first[0]} on {first[1]}, {own[0]} on {own[1]}"
        if not self._store.check([self._keys["runs"]]):
            self._store.set(self._keys["differs"], problem)
            end_for_all()
        raise _error(problem)

    def mark_running(self) -> None:
        """From here on, a node that comes with another number ends alone."""
        self._store.set(self._keys["runs"], "1")

    def raise_if_known(self) -> None:
        """Tell what a node has found to differ before the run began.

        Raises:
            UserError: one has.
        """
        if self._store.check([self._keys["differs"]]):
            raise _error(self._store.get(self._keys["differs"]).decode())


def _error(problem: str) -> UserError:
    return UserError("--nnodes", problem, "Type the same on every node.")
