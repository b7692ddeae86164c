"""A place where a training run meets faults: a cluster of nodes, a store behind a faulty proxy.

The run's driver is a process of its own. Every worker logs the samples it trains on to a local
file, apart from the checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from conftest import SHAPES_YAML, override
from faulty_proxy import FaultyProxy, faulty_proxy
from ray.cluster_utils import Cluster
from s3_server import s3_server
from sample_log import samples
from torch import Tensor

from clip_ray.config_file import dump_config, load_config
from clip_ray.data.prepare import prepare
from clip_ray.data.shapes import ShapesSpec, write_shapes
from clip_ray.errors import RunError
from clip_ray.ports import free_ports
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints
from clip_ray.training.ledger import Ledger, State

DRIVER = Path(__file__).with_name("fault_driver.py")
# One training worker fits a node, beside its readers.
NODE: dict[str, Any] = {"num_cpus": 3, "object_store_memory": 300 * 2**20}
OF_A_RUN = ("RayTrainWorker", "TrainController", "MapWorker", "Board", "PreemptionWatcher")
RECOVERY_TIMEOUT_S = 240.0


class FaultSite:
    """Two worker nodes, one training worker on each; faults; and what the run has made."""

    def __init__(
        self,
        folder: Path,
        options: list[str],
        pause_s: float,
        start_cluster: Callable[[], Any],
        seed: int = 0,
    ) -> None:
        self.folder, self._pause_s, self.random = folder, pause_s, random.Random(seed)
        self._stack = contextlib.ExitStack()
        self._server = self._serve()
        self.cluster = start_cluster()
        host = self.cluster.address.split(":")[0]  # which every node reaches
        self.proxy: FaultyProxy = self._stack.enter_context(
            faulty_proxy(os.environ["AWS_ENDPOINT_URL"], host)
        )
        raw = folder / "raw"
        write_shapes(raw, ShapesSpec(train=96, val=16, test=16, zero_shot_per_class=1))
        self.config = load_config(SHAPES_YAML, [
            "storage.root=s3://clip-ray-faults/site", f"data.source={raw}",
            f"data.zero_shot_source={raw / 'zero-shot'}",
            "data.row_group_rows=8", "data.shuffle_window_rows=64",
            f"data.cache_dir={folder / 'cache'}", "train.global_batch=24",
            "cluster.num_workers=2", "cluster.cpus_per_worker=2", "cluster.readers_per_worker=1",
            "cluster.max_failures=-1", "cluster.insecure=true", "logging.tensorboard=false",
            *options,
        ])  # fmt: skip
        Storage(self.config.storage.root).create_bucket()
        self.nodes = [self.cluster.add_node(**NODE) for _ in range(2)]
        self.driver_prefix: list[str] = []  # before the driver's command
        self.driver: subprocess.Popen[str] | None = None
        self.log = (folder / "driver.log").open("a")

    def _serve(self) -> contextlib.ExitStack:
        server = contextlib.ExitStack()
        server.enter_context(_environment_kept())
        os.environ |= server.enter_context(s3_server(self.folder / "s3"))
        return server

    def restart_store(self) -> None:
        """The embedded server, killed and started again on what it has on disk."""
        for process in psutil.Process().children():
            if process.name() == "weed":
                process.kill()
        time.sleep(1)
        self._server.close()
        self._server = self._serve()
        self.proxy.upstream = os.environ["AWS_ENDPOINT_URL"]

    def prepare(self) -> None:
        with self._connected():
            prepare(self.config.data, Storage(self.config.data_root), lambda line: None)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        environment = {"env_vars": {"AWS_ENDPOINT_URL": self.proxy.url}}
        ray.init(self.cluster.address, log_to_driver=False, runtime_env=environment)
        try:
            yield
        finally:
            ray.shutdown()

    def start(self, name: str, stop_at: int = -1, pause_s: float | None = None) -> None:
        """The driver of the run `name`; the store is behind the proxy for it."""
        self.config = override(self.config, [f"name={name}"])
        path = self.folder / f"{name}.yaml"
        path.write_text(dump_config(self.config))
        pause_s = self._pause_s if pause_s is None else pause_s
        self.ids(name).mkdir(exist_ok=True)
        self.driver = subprocess.Popen(
            [*self.driver_prefix, sys.executable]
            + [str(each) for each in (DRIVER, path, self.ids(name), pause_s, stop_at)],
            env=os.environ
            | {"RAY_ADDRESS": self.cluster.address, "AWS_ENDPOINT_URL": self.proxy.url},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )

    def said(self) -> str:
        """What drivers have said so far."""
        return (self.folder / "driver.log").read_text()

    def state(self) -> State:
        return Ledger(Storage(self.config.run_root)).read()

    def newest_state(self) -> dict[str, Tensor]:
        """The tensors of the newest checkpoint."""
        checkpoints = Checkpoints(Storage(self.config.run_root))
        newest = checkpoints.newest()
        assert newest is not None
        return checkpoints.read(newest).tensors

    def newest_step(self) -> int:
        return max((entry.step for entry in self.state().checkpoints), default=0)

    def last_step(self) -> int:
        """How many steps have been begun: a checkpoint of a later one was made after this call."""
        return max(samples(self.ids(self.config.name)), default=-1) + 1

    def await_step(self, step: int, timeout_s: float = RECOVERY_TIMEOUT_S) -> float:
        """Waits for a committed checkpoint of `step` or later; how long that took."""
        started_s = time.monotonic()
        while True:
            with contextlib.suppress(RunError):
                if self.newest_step() >= step:
                    return time.monotonic() - started_s
            self._restart_driver()
            if time.monotonic() - started_s > timeout_s:
                raise TimeoutError(f"no checkpoint of step {step}: {self.said()[-3000:]}")
            time.sleep(0.3)

    def await_new_step(self, after: int, timeout_s: float = RECOVERY_TIMEOUT_S) -> float:
        """Waits until a worker begins a step later than `after`; how long that took."""
        started_s = time.monotonic()
        while self.last_step() <= after:
            self._restart_driver()
            if time.monotonic() - started_s > timeout_s:
                raise TimeoutError(f"no step after {after}: {self.said()[-3000:]}")
            time.sleep(0.2)
        return time.monotonic() - started_s

    def await_said(self, words: str, times: int, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
        """Waits until drivers have said these words so often."""
        started_s = time.monotonic()
        while self.said().count(words) < times:
            self._restart_driver()
            if time.monotonic() - started_s > timeout_s:
                raise TimeoutError(f"{words!r} was not said: {self.said()[-3000:]}")
            time.sleep(0.2)

    def _restart_driver(self) -> None:
        """As a person, or a scheduler, would."""
        if self.driver is not None and self.driver.poll() not in (None, 0):
            self.start(self.config.name)

    def await_end(self, timeout_s: float = RECOVERY_TIMEOUT_S) -> int:
        assert self.driver is not None
        return self.driver.wait(timeout_s)

    def stop(self) -> int:
        """Asks for a last checkpoint and the end; the driver's exit code."""
        assert self.driver is not None
        self.driver.send_signal(signal.SIGINT)
        return self.await_end()

    def processes(self, *words: str) -> list[psutil.Process]:
        """The cluster's processes with one of these words in their titles."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and any(word in title for word in words):
                    found.append(process)
        return found

    def a_worker(self) -> psutil.Process:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if found := self.processes("RayTrainWorker"):
                return self.random.choice(found)
            time.sleep(0.2)
        raise TimeoutError("no training worker is there")

    def ids(self, name: str) -> Path:
        """Where the workers of the run `name` log what they train on."""
        return self.folder / f"ids-{name}"

    def left_behind(self) -> list[str]:
        """Processes, placement groups and files that should be gone when no run is there."""
        deadline_s, left = time.monotonic() + 30, list[str]()
        while time.monotonic() < deadline_s:
            left = [" ".join(process.cmdline()) for process in self.processes(*OF_A_RUN)]
            if not left:
                break
            time.sleep(0.5)
        with self._connected():
            groups = ray.util.placement_group_table()
        left += [f"placement group {k}" for k, v in groups.items() if v["state"] != "REMOVED"]
        left += [str(path) for path in (self.folder / "cache").glob("*.part")]
        return left

    def close(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait(10)
        self.cluster.shutdown()
        self._stack.close()
        self._server.close()
        self.log.close()


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def one_machine() -> Cluster:
    """A head without CPUs, to which nodes are added, all at this machine's address."""
    head = {"num_cpus": 0, "object_store_memory": 200 * 2**20, "dashboard_port": free_ports(1)[0]}
    return Cluster(initialize_head=True, head_node_args=head)


@contextlib.contextmanager
def fault_site(
    folder: Path,
    options: list[str],
    pause_s: float = 0.0,
    start_cluster: Callable[[], Any] = one_machine,
) -> Iterator[FaultSite]:
    site = FaultSite(folder, options, pause_s, start_cluster)
    try:
        site.prepare()
        yield site
    finally:
        site.close()
