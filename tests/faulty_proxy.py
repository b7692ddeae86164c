"""A TCP proxy before the real S3 server that can fail for a while, or be slow."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

# reset: connections are cut and refused. 503: every request is answered so. hang: what comes is
# taken and never answered. full: what would write is refused.
Fault = Literal["reset", "503", "hang", "full"]
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
NO_SPACE = b"<Error><Code>InsufficientStorage</Code><Message>The disk is full.</Message></Error>"
FULL = (
    b"HTTP/1.1 507 Insufficient Storage\r\nContent-Type: application/xml\r\nContent-Length: "
    + str(len(NO_SPACE)).encode()
    + b"\r\nConnection: close\r\n\r\n"
    + NO_SPACE
)


class FaultyProxy:
    """Passes connections on to `upstream`, except for the time that `fail` names.

    `up_bytes_per_s`: how fast clients send, all together; None for as fast as they can.
    """

    def __init__(self, upstream: str, host: str = "127.0.0.1") -> None:
        self.upstream = upstream
        self.up_bytes_per_s: float | None = None
        self.refused = 0
        self._listener = socket.create_server((host, 0))
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"
        self._fault: Fault = "reset"
        self._until = self._sent_until = 0.0
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, fault: Fault, seconds: float) -> None:
        """Cuts what is open, and fails what comes, for a while."""
        self._fault, self._until = fault, time.monotonic() + seconds
        for each in self._open:
            reset(each)
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _failing(self, fault: Fault) -> bool:
        return self._fault == fault and time.monotonic() < self._until

    def _serve(self, client: socket.socket) -> None:
        self._open.append(client)
        with contextlib.suppress(OSError):
            if self._failing("reset"):
                self.refused += 1
                return reset(client)
            if self._failing("503"):
                self.refused += 1
                client.recv(65536)
                client.sendall(BUSY)
                return client.close()
            if self._failing("hang"):
                self.refused += 1
                return None
            place = urlsplit(self.upstream)
            server = socket.create_connection((place.hostname or "", place.port or 80))
            self._open.append(server)
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            copy(server, client)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self._failing("full") and data.startswith((b"PUT ", b"POST ")):
                    self.refused += 1
                    client.sendall(FULL)
                    break
                self._await_turn(len(data))
                server.sendall(data)
        shut(client, server)

    def _await_turn(self, size_bytes: int) -> None:
        if self.up_bytes_per_s is None:
            return
        with self._lock:
            begin_s = max(self._sent_until, time.monotonic())
            self._sent_until = begin_s + size_bytes / self.up_bytes_per_s
        time.sleep(max(0.0, self._sent_until - time.monotonic()))


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    shut(source, sink)


def shut(*connections: socket.socket) -> None:
    for each in connections:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def reset(connection: socket.socket) -> None:
    """Closes so that the other side sees a reset, not an end."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A thread that waits for it would keep the connection open.
        connection.shutdown(socket.SHUT_RD)
        connection.close()


@contextlib.contextmanager
def faulty_proxy(upstream: str, host: str = "127.0.0.1") -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(upstream, host)
    try:
        yield proxy
    finally:
        proxy.close()
