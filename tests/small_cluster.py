"""A real Ray cluster of named nodes on this machine, each with an environment of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from clip_ray.ports import free_ports

REPOSITORY = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
START_TIMEOUT_S = 60
STORE_BYTES = 150_000_000


class SmallCluster:
    """A head, and the nodes that `add` starts beside it."""

    def __init__(self, folder: Path, token: str | None) -> None:
        self.folder = folder
        gcs, self.dashboard, client, self.agent = free_ports(4)
        self._ports = [f"--port={gcs}", f"--dashboard-port={self.dashboard}"]
        self._ports += [f"--ray-client-server-port={client}"]
        self.address = f"127.0.0.1:{gcs}"
        # Ray's sockets lie below this folder, and their paths may have 107 characters at most.
        self.ray_folder = folder / "r"
        self.environment = {"PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"}
        if token:
            path = folder / "token"
            path.touch(mode=0o600)
            path.write_text(token)
            self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start_head(self, environment: Mapping[str, str]) -> None:
        options = [
            "--head", *self._ports, "--dashboard-host=127.0.0.1", f"--temp-dir={self.ray_folder}",
            f"--dashboard-agent-listen-port={self.agent}",
        ]  # fmt: skip
        self._start("head", options, environment, ())

    def add(
        self,
        name: str,
        environment: Mapping[str, str],
        before: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        """Starts a node; `before` is a command that runs another, as `nice` does."""
        options = [f"--address={self.address}", "--dashboard-agent-listen-port=0", *options]
        self._start(name, options, environment, before)

    def doctor(
        self, *arguments: str, start_timeout_s: int = 90
    ) -> subprocess.CompletedProcess[str]:
        """The command beside the head, whose own environment tells nothing of S3."""
        command = ["doctor", "--address", self.address, *arguments]
        script = "from clip_ray.cli import main; from clip_ray.cluster import doctor; "
        script += f"doctor.START_TIMEOUT_S = {start_timeout_s}; main({command!r})"
        return subprocess.run(
            [sys.executable, "-c", script],
            env=_own_environment() | self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def freeze(self, name: str) -> None:
        """Stops all processes of a node, as a machine that hangs does."""
        node = psutil.Process(self._started[name].pid)
        for process in [node, *node.children(recursive=True)]:
            process.suspend()

    def stop(self, *names: str) -> None:
        """Ends these nodes, or all of them."""
        ended = [self._started.pop(name) for name in names or reversed(list(self._started))]
        for sign in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            for process in ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
            deadline_s = time.monotonic() + (0 if sign == signal.SIGCONT else 15)
            for process in ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline_s - time.monotonic()))

    def _start(
        self,
        name: str,
        options: Sequence[str],
        environment: Mapping[str, str],
        before: Sequence[str],
    ) -> None:
        command = [
            *before, str(RAY), "start", "--block", "--disable-usage-stats", f"--node-name={name}",
            "--node-ip-address=127.0.0.1", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}",
            "--min-worker-port=0", "--max-worker-port=0", *options,
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env={**_own_environment(), **self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started[name] = process
        _await_start(process, self.folder / f"{name}.log")


def _await_start(node: subprocess.Popen[bytes], log: Path) -> None:
    """Nodes of one machine that start at once get in each other's way."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in (text := log.read_text(errors="replace")):
        assert node.poll() is None, text[-2000:]
        assert time.monotonic() < deadline_s, f"{log.stem} did not start: {text[-2000:]}"
        time.sleep(0.2)


def _own_environment() -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    return own | {"PATH": f"{RAY.parent}:{os.environ['PATH']}"}


@contextlib.contextmanager
def small_cluster(head: Mapping[str, str], with_token: bool) -> Iterator[SmallCluster]:
    """A cluster of a head that has this environment."""
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        cluster = SmallCluster(Path(folder), secrets.token_hex(32) if with_token else None)
        try:
            cluster.start_head(head)
            yield cluster
        finally:
            cluster.stop()
