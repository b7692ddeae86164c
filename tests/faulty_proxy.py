"""A TCP proxy before the real S3 server that can refuse for a while: resets, or answers 503."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["reset", "503"]
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultyProxy:
    """Passes connections on, except for the time that `fail` names."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._fault: Fault = "reset"
        self._until = 0.0
        self._open: list[socket.socket] = []
        self.refused = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, fault: Fault, seconds: float) -> None:
        """Cuts what is open, and refuses what comes, for a while."""
        self._fault, self._until = fault, time.monotonic() + seconds
        for each in self._open:
            reset(each)

    def close(self) -> None:
        self._listener.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if time.monotonic() < self._until:
            self.refused += 1
            with contextlib.suppress(OSError):
                if self._fault == "503":
                    client.recv(65536)
                    client.sendall(BUSY)
                    client.close()
                else:
                    reset(client)
            return
        server = socket.create_connection(self._upstream)  # type: ignore[arg-type]
        self._open += [client, server]
        threading.Thread(target=copy, args=(client, server), daemon=True).start()
        copy(server, client)


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def reset(connection: socket.socket) -> None:
    """Closes so that the other side sees a reset, not an end."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
