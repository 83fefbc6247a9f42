"""Which address of this machine the others reach it by, and whether they can be reached.

Host names are no help here: Debian writes 127.0.1.1 for a machine's own name into /etc/hosts, where
no other machine finds it.  What counts is the address that packets to the others leave from, which
the kernel's routing table tells without sending one.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Callable

from litespark.errors import LitesparkError, UserError

_ATTEMPT_SECONDS = 3.0  # for one connection; a firewall that drops packets never answers
_PATIENCE_SECONDS = 5.0  # before somebody who waits is told for whom
_POLL_SECONDS = 0.5


def resolve(host: str, patience_seconds: float = 0.0) -> str:
    """The first address of a host, whose name may take `patience_seconds` to be known.

    Raises:
        UserError: the name is not known here.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    host,
                    f"is no name that {socket.gethostname()} can resolve ({_reason(error)})",
                    "Give an address, or add the name to DNS or to /etc/hosts of every node.",
                ) from None
        time.sleep(_POLL_SECONDS)


def is_own_address(address: str) -> bool:
    """Whether this machine has the address: only then can it be bound to."""
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def address_towards(address: str) -> str:
    """The address of this machine that packets to `address` carry; nothing is sent.

    Raises:
        LitesparkError: there is no route.
    """
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise LitesparkError(
                f"{socket.gethostname()} has no route to {address} ({_reason(error)}). "
                "Look at `ip route`; is the link up?"
            ) from None
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether an address means "this machine" on every machine."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def outward_address() -> str | None:
    """This machine's address for others: that of its default route, or its only one."""
    try:
        return address_towards("192.0.2.1")  # reserved for documentation: nobody has it
    except LitesparkError:
        pass
    import psutil

    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not is_loopback(entry.address)
    ]
    return found[0] if len(found) == 1 else None


def interface_of(address: str) -> str | None:
    """The name of the network interface that has the address, e.g. `eth0`."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def check_port_free(address: str, port: int) -> None:
    """Whether this machine can listen there.

    Raises:
        UserError: another process does already.
    """
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise UserError(
                f"port {port} of {socket.gethostname()}",
                "is taken by another process, maybe another job"
                if taken
                else f"cannot be listened on ({_reason(error)})",
                f"Give another port on every node; `ss -ltnp 'sport = :{port}'` says who has it.",
            ) from None


def wait_for_port(host: str, port: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Wait until somebody listens at `host:port`; `tell` hears once for whom we wait and why.

    Raises:
        LitesparkError: nobody did in that time.
    """
    started = time.monotonic()
    told = False
    while True:
        reason = connection_problem(host, port)
        waited = time.monotonic() - started
        if reason is None:
            return
        if waited >= seconds:
            raise LitesparkError(
                f"{socket.gethostname()} cannot reach {host}:{port}, tried for {seconds:g} s: "
                f"{reason}. Is the same command running on {host}? Do both nodes name the same "
                "host and port? Does a firewall let the nodes talk to each other?"
            )
        if not told and waited >= min(_PATIENCE_SECONDS, seconds / 2):
            tell(f"waiting for {host}:{port} ({reason})")
            told = True
        time.sleep(_POLL_SECONDS)


def connection_problem(host: str, port: int, seconds: float = _ATTEMPT_SECONDS) -> str | None:
    """Why a connection cannot be made, in words; None if it can."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return None
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return _reason(error)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
