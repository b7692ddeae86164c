"""A proxy before the real S3 server that lacks something, as some stores and policies do."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from faulty_proxy import copy, shut

# From a request's head, in lower case, to the status and code of an answer; None passes it on.
Rule = Callable[[str], tuple[str, str] | None]


def read_only(head: str) -> tuple[str, str] | None:
    """A policy that lets nobody write."""
    writes = head.startswith(("put ", "post ", "delete "))
    return ("403 Forbidden", "AccessDenied") if writes else None


def no_multipart(head: str) -> tuple[str, str] | None:
    """A store without uploads in parts."""
    begins = head.startswith("post ") and "?uploads" in head.partition("\r\n")[0]
    return ("501 Not Implemented", "NotImplemented") if begins else None


def no_checksums(head: str) -> tuple[str, str] | None:
    """A store that knows nothing of the checksums which current SDKs send."""
    sent = "\r\nx-amz-trailer:" in head or "\r\nx-amz-sdk-checksum-algorithm:" in head
    return ("400 Bad Request", "InvalidArgument") if sent else None


def no_conditions(head: str) -> tuple[str, str] | None:
    """A store that puts whatever the condition is."""
    conditional = "\r\nif-none-match:" in head or "\r\nif-match:" in head
    return ("200 OK", "") if conditional else None


@contextlib.contextmanager
def picky_s3(upstream: str, rule: Rule) -> Iterator[str]:
    """Yields the URL of a proxy that answers by the rule, and passes on what it says nothing of."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = (listener, upstream, rule)
        threading.Thread(target=_accept, args=arguments, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, upstream: str, rule: Rule) -> None:
    with contextlib.suppress(OSError):  # the listener was closed
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, upstream, rule), daemon=True).start()


def _serve(client: socket.socket, upstream: str, rule: Rule) -> None:
    with contextlib.suppress(OSError), client:
        received = b""
        while b"\r\n\r\n" not in received:
            if not (more := client.recv(65536)):
                return
            received += more
        head, _, rest = received.partition(b"\r\n\r\n")
        if refused := rule(head.decode("latin-1").lower()):
            _answer(client, *refused)
            return
        place = urlsplit(upstream)
        with socket.create_connection((place.hostname or "", place.port or 80)) as server:
            # One request for each connection, so that the rule sees all.
            lines = [x for x in head.split(b"\r\n") if not x.lower().startswith(b"connection:")]
            server.sendall(b"\r\n".join([*lines, b"Connection: close", b"", rest]))
            threading.Thread(target=copy, args=(client, server), daemon=True).start()
            copy(server, client)


def _answer(client: socket.socket, status: str, code: str) -> None:
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>" if code else ""
    head = f'HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nETag: "0"\r\n'
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    client.sendall((head + body).encode())
    # What the client still sends is taken, or it would see a reset before the answer.
    client.settimeout(2)
    client.shutdown(socket.SHUT_WR)
    while client.recv(65536):
        pass
    shut(client)
