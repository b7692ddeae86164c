"""The faults a training run meets: each returns when it has been done.

The run must go on by itself, or once its driver is started again (`FaultSite.await_step`).
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_site import NODE, FaultSite
from faulty_proxy import Fault
from sample_log import wants_memory

from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints

S3_FAULT_S = 8.0


def worker_killed(site: FaultSite) -> None:
    site.a_worker().kill()


def worker_stopped(site: FaultSite) -> None:
    site.a_worker().suspend()


def worker_told_to_end(site: FaultSite) -> None:
    site.a_worker().terminate()


def worker_out_of_memory(site: FaultSite) -> None:
    worker = site.a_worker()
    limit = worker.memory_info().vms + 2**20
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, limit))
    # What it has may do for long: from now on it wants more.
    wants_memory(site.ids(site.config.name), worker.pid).touch()


def node_killed(site: FaultSite) -> None:
    node = site.nodes.pop(site.random.randrange(len(site.nodes)))
    site.cluster.remove_node(node, allow_graceful=False)
    time.sleep(3)
    site.nodes.append(site.cluster.add_node(**NODE))


def drain(site: FaultSite, node: Any, deadline_s: int) -> None:
    """What a cloud does before it takes a node away."""
    ray = Path(sys.executable).with_name("ray")
    command = [
        str(ray), "drain-node", f"--address={site.cluster.address}",
        f"--node-id={node.node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test",
        f"--deadline-remaining-seconds={deadline_s}",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=60, capture_output=True)


def driver_killed(site: FaultSite) -> None:
    assert site.driver is not None
    os.killpg(site.driver.pid, signal.SIGKILL)
    site.driver.wait(10)


def controller_killed(site: FaultSite) -> None:
    for process in site.processes("TrainController"):
        process.kill()


def checkpoint_truncated(site: FaultSite) -> None:
    """The workers start again while half of the newest checkpoint's first object is missing."""
    worker_killed(site)
    storage, newest = Storage(site.config.run_root), site.state().checkpoints[-1]
    key = f"{newest.folder}/{Checkpoints(storage).manifest(newest).files[0].name}"
    whole = storage.read_bytes(key)
    storage.write_bytes(key, whole[: len(whole) // 2])


def disk_full(site: FaultSite) -> None:
    """The workers start again on nodes whose disk takes no row group. Needs root."""
    cache = str(site.folder / "cache")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", cache]
    subprocess.run(mount, check=True, timeout=60)
    try:
        worker_killed(site)
        site.await_new_step(site.last_step())
    finally:
        subprocess.run(["umount", "-l", cache], check=True, timeout=60)


def store_fails(site: FaultSite, fault: Fault) -> None:
    site.proxy.fail(fault, S3_FAULT_S)
    time.sleep(S3_FAULT_S)


FAULTS: dict[str, Callable[[FaultSite], None]] = {
    "worker killed": worker_killed,
    "worker stopped": worker_stopped,
    "worker told to end": worker_told_to_end,
    "worker out of memory": worker_out_of_memory,
    "node killed": node_killed,
    "driver killed": driver_killed,
    "controller killed": controller_killed,
    "store killed": FaultSite.restart_store,
    "store resets": lambda site: store_fails(site, "reset"),
    "store busy": lambda site: store_fails(site, "503"),
    "store hangs": lambda site: store_fails(site, "hang"),
    "store full": lambda site: store_fails(site, "full"),
    "checkpoint truncated": checkpoint_truncated,
    "disk full": disk_full,
}
