"""Ports for processes of one machine that are about to meet."""

from __future__ import annotations

import contextlib
import os
import random
import socket

_FIRST = 20000
_PORTS_OF_A_WORKER = 1500
_given: set[int] = set()


def free_port() -> int:
    """A port below those that the system gives to connections, which could take it meanwhile.

    None is given again before hundreds of others; no two of pytest's workers draw from the same.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    first = _FIRST + _PORTS_OF_A_WORKER * worker
    if len(_given) >= _PORTS_OF_A_WORKER // 2:  # a long soak
        _given.clear()
    while True:
        port = random.SystemRandom().randrange(first, first + _PORTS_OF_A_WORKER)
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port
