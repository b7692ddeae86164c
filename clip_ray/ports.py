"""Ports for servers of our own on this machine."""

from __future__ import annotations

import contextlib
import secrets
import socket

# Above those of Ray's workers, below those that systems give to outgoing connections: between the
# choice and the start of a server, no process that only connects takes one away.
_RANGE = range(20_000, 30_000)


def free_ports(count: int) -> list[int]:
    """So many ports, all different, drawn from those that nobody on this machine listens on."""
    ports = []
    with contextlib.ExitStack() as stack:
        while len(ports) < count:
            listener = stack.enter_context(socket.socket())
            port = secrets.choice(_RANGE)
            with contextlib.suppress(OSError):  # taken
                listener.bind(("", port))
                ports.append(port)
    return ports
