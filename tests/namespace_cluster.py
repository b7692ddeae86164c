"""A Ray cluster over a real network: each node in a network namespace with an address of its own.

The namespaces hang on a bridge; the head is outside, at the bridge's address. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import gcs_pb2
from ray.exceptions import RpcError

RAY = Path(sys.executable).with_name("ray")
START_TIMEOUT_S = 90
GCS_PORT = 6399
ALIVE: int = gcs_pb2.GcsNodeInfo.ALIVE  # pyright: ignore[reportAttributeAccessIssue]
# A node that is cut off is given up after five seconds, not thirty.
ENVIRONMENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def why_not() -> str | None:
    """Why this machine cannot have such a cluster; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"clip-ray-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {error}"
    return None


@dataclass(frozen=True)
class Redis:
    """Where the head keeps what its nodes and actors are, so that another head can go on."""

    address: str
    password: str

    @property
    def environment(self) -> list[str]:
        """For the head's `env`."""
        return [f"RAY_REDIS_ADDRESS={self.address}"]

    @property
    def of_head(self) -> list[str]:
        """Options of the head."""
        return [f"--redis-password={self.password}"]


@dataclass
class Node:
    """A raylet in its namespace."""

    name: str
    address: str
    link: str  # its end at the bridge
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def inside(self) -> list[str]:
        """What stands before a command that runs where the node is."""
        return ["ip", "netns", "exec", self.name, "env", f"DRIVER_ADDRESS={self.address}"]


class NamespaceCluster:
    """ray.cluster_utils.Cluster's part that the tests use, and the network's own faults."""

    def __init__(self, redis: Redis | None = None) -> None:
        # One of 200 networks of a range that is kept for benchmarks (RFC 2544).
        self._net, self._bridge = f"198.18.{os.getpid() % 200}", f"cr{os.getpid()}"
        # All as this process, in which a Ray of its own may have turned it on.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self._environment, self._redis = os.environ | ENVIRONMENT, redis
        self._folder = tempfile.TemporaryDirectory(
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        )
        self._nodes: list[Node] = []
        self._made = 0
        self.host = f"{self._net}.1"
        self.address = f"{self.host}:{GCS_PORT}"
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        self._head: subprocess.Popen[bytes] | None = None
        try:
            self.start_head()
        except BaseException:
            self.shutdown()
            raise

    def start_head(self) -> None:
        """The head, at the address it had before."""
        # Ray starts no head where it sees the nodes of one: it shall see its own processes alone.
        alone = ["unshare", "--pid", "--fork", "--mount-proc", *_pids_unlike_ours()]
        environment = ["env", *(self._redis.environment if self._redis else [])]
        self._head = self._start(
            [*alone, *environment], "--head",
            f"--port={GCS_PORT}", f"--node-ip-address={self.host}", "--include-dashboard=false",
            "--num-cpus=0", "--object-store-memory=200000000",
            f"--temp-dir={self._folder.name}", *(self._redis.of_head if self._redis else []),
        )  # fmt: skip
        self._await(lambda: self.host in self._alive(), f"head at {self.address}")

    def kill_head(self) -> None:
        """GCS, raylet and all else of the head, at once."""
        assert self._head is not None
        _kill(self._head)

    def add_node(self, num_cpus: int, object_store_memory: int) -> Node:
        self._made += 1
        name, link = f"{self._bridge}-{self._made}", f"{self._bridge}v{self._made}"
        node = Node(name, f"{self._net}.{self._made + 1}", link)
        _ip("netns", "add", name)
        self._nodes.append(node)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self._bridge, "up")
        for command in (
            ["addr", "add", f"{node.address}/24", "dev", "eth0"],
            ["link", "set", "lo", "up"],
            ["link", "set", "eth0", "up"],
        ):
            _ip("-n", name, *command)
        node.process = self._start(
            node.inside, f"--address={self.address}", f"--node-ip-address={node.address}",
            f"--num-cpus={num_cpus}", f"--object-store-memory={object_store_memory}",
        )  # fmt: skip
        self._await(lambda: node.address in self._alive(), f"node at {node.address}")
        return node

    def cut(self, node: Node) -> None:
        """Takes the node's link down: nothing is refused, nothing arrives."""
        _ip("-n", node.name, "link", "set", "eth0", "down")

    def remove_node(self, node: Node, allow_graceful: bool = True) -> None:
        self._nodes.remove(node)
        if node.process is not None:
            _kill(node.process)
        for command in (["link", "del", node.link], ["netns", "del", node.name]):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(*command)

    def shutdown(self) -> None:
        for node in list(self._nodes):
            self.remove_node(node)
        if self._head is not None:
            _kill(self._head)
        _ip("link", "del", self._bridge)
        self._folder.cleanup()

    def _start(self, prefix: list[str], *arguments: str) -> subprocess.Popen[bytes]:
        command = [*prefix, str(RAY), "start", "--block", "--disable-usage-stats", *arguments]
        return subprocess.Popen(
            command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _alive(self) -> set[str]:
        """Addresses of the nodes that the GCS takes for alive."""
        with contextlib.suppress(RpcError):
            nodes = GcsClient(self.address).get_all_node_info(timeout=5).values()
            return {node.node_manager_address for node in nodes if node.state == ALIVE}
        return set()

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no {what} within {START_TIMEOUT_S} s")
            time.sleep(0.2)


def _pids_unlike_ours() -> list[str]:
    """What stands before a command in a namespace of processes, so that none has a driver's number.

    The head's raylet watches a driver by its number: a driver that it cannot see is left alone,
    but where a process of its own has the same number, it ends the driver with that process.
    """
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    last = (os.getpid() + pid_max // 2) % pid_max
    return ["sh", "-c", f'echo {last} > /proc/sys/kernel/ns_last_pid; exec "$@"', "sh"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30, capture_output=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
