"""Starts a real Ray head with its dashboard, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from clip_ray.ports import free_ports

RAY = Path(sys.executable).parent / "ray"
START_TIMEOUT_S = 90


@contextlib.contextmanager
def ray_head(
    environment: Mapping[str, str], num_cpus: int = 4, open_to_all: bool = False
) -> Iterator[dict[str, str]]:
    """Yields the environment that a client of the head needs, a token's unless `open_to_all`."""
    gcs, dashboard, client, agent = free_ports(4)
    # Ray's sockets lie below this folder, and their paths may have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        mode = "disabled" if open_to_all else "token"
        common = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(token)}
        bin_first = f"{RAY.parent}:{os.environ['PATH']}"
        head = subprocess.Popen(
            [
                str(RAY), "start", "--head", "--block", "--disable-usage-stats",
                "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
                f"--port={gcs}", f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                f"--num-cpus={num_cpus}", "--object-store-memory=1000000000",
                f"--temp-dir={folder}/r",
            ],
            env=os.environ | environment | common | {"PATH": bin_first},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            _await_port(dashboard, head)
            yield {**common, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", "PATH": bin_first}
        finally:
            _stop(head)


def _await_port(port: int, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head died"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.5)
    raise TimeoutError(f"the dashboard did not open its port within {START_TIMEOUT_S} s")


def _stop(head: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(15)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
