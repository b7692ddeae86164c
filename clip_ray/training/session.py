"""A connection to a Ray cluster, or a Ray of one's own for as long as it is needed."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.data
import ray.util
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
from ray.data._internal.stats import get_or_create_stats_actor

from clip_ray.config import ClusterConfig, Config
from clip_ray.data.stream import READER_CPUS
from clip_ray.environment import FORWARDED, temporary_environment
from clip_ray.errors import RunError
from clip_ray.ports import free_ports
from clip_ray.priority import give_way

# How long Ray waits, in its own processes.
TIMEOUTS = {
    # A stream asks that the nodes be kept, every few seconds; what a worker that was killed has
    # asked for is to be forgotten sooner than after three minutes, or idle nodes stay so long.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "60",
    # For workers to leave their process group, before they are killed: one that hangs never does.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
GCS_PORT = "RAY_GCS_SERVER_PORT"
# For Ray's own processes of a local Ray. No workers are started ahead: they would lack the job's
# environment, and none of its tasks would be given to them. Ray gives all workers the niceness 15.
LOCAL_RAY = {
    "RAY_prestart_worker_first_driver": "0", "RAY_worker_maximum_startup_concurrency": "16",
    "RAY_worker_niceness": "0",
}  # fmt: skip
# Where no dashboard listens, nobody looks at all log files ten times a second, and at all processes
# every few seconds.
NO_DASHBOARD = {
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0", "LOG_NAME_UPDATE_INTERVAL_S": "60",
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "60", "REPORTER_UPDATE_INTERVAL_MS": "60000",
}  # fmt: skip
GIVE_WAY = f"{give_way.__module__}.{give_way.__qualname__}"
# For Ray Train on a local Ray, whose one node is never drained.
NO_DRAINS = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@contextlib.contextmanager
def ray_session(config: Config, dashboard: bool = False) -> Iterator[None]:
    """A connection to the cluster that the config or RAY_ADDRESS names, or a local Ray.

    A local Ray is stopped at the end of the block; `dashboard` says whether it has one. Raises
    RunError where the cluster is open to others.
    """
    if ray.is_initialized():
        yield
        return
    if config.cluster.gpus_per_worker == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        arguments, settings = _local_ray(config.cluster, dashboard)
        gcs = f"{ray.util.get_node_ip_address()}:{settings[GCS_PORT]}"
        of_job = {"env_vars": _environment(gcs) | NO_DRAINS, "worker_process_setup_hook": GIVE_WAY}
    else:
        arguments, settings = {}, {}
        of_job = {"env_vars": _environment(canonicalize_bootstrap_address_or_die(address))}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a submitted job's runtime_env says already may be said again here.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    with _sigterm_kept(), temporary_environment(settings):
        ray.init(
            address or "local",
            runtime_env=of_job,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **arguments,
        )
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.print_on_execution_start = False
    try:
        if address is not None:
            _refuse_open_cluster(config.cluster)
        _start_data_actors()
        yield
    finally:
        ray.shutdown()


def _local_ray(cluster: ClusterConfig, dashboard: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """ray.init's arguments for a Ray of one's own, and the environment of its processes."""
    # Readers get CPUs of their own beside the workers', or a small machine would never start;
    # twice, since a link of the stream begins before the last one ends.
    readers_cpus = 2 * READER_CPUS * cluster.readers_per_worker
    wanted = cluster.num_workers * (cluster.cpus_per_worker + readers_cpus) + 1
    arguments = {
        "num_cpus": max(os.cpu_count() or 1, math.ceil(wanted)),
        "include_dashboard": dashboard,
        "object_store_memory": 2**30,
    }
    gcs_port, dashboard_port = free_ports(2)
    settings = LOCAL_RAY | {GCS_PORT: str(gcs_port)}
    if dashboard:
        return arguments, settings
    # Ray tells a port all the same, where another Ray's may answer; Ray Train asks there whether
    # its controller lives, and ends the workers of one that is not known.
    return arguments | {"dashboard_port": dashboard_port}, settings | NO_DASHBOARD


def _environment(gcs: str) -> dict[str, str]:
    """What all processes of the job have in theirs; `gcs` is the address of their cluster."""
    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    # Ray Train's own actors would look for the cluster they are in, and take another one for it.
    return forwarded | TIMEOUTS | {"RAY_ADDRESS": gcs}


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray's handler would end the driver at once; the command's lets a run take a checkpoint."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _refuse_open_cluster(cluster: ClusterConfig) -> None:
    """Raises RunError where other machines reach the cluster and it wants no token of them."""
    addresses = {str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    exposed = sorted(one for one in addresses if not ipaddress.ip_address(one).is_loopback)
    if exposed and os.environ.get("RAY_AUTH_MODE") != "token" and not cluster.insecure:
        raise RunError(
            f"the cluster at {exposed[0]} lets in everybody who reaches it, to run any code: start "
            "it with RAY_AUTH_MODE=token, or set cluster.insecure=true"
        )


def _start_data_actors() -> None:
    """Starts Ray Data's detached actors on the driver's node, before a worker does on its own.

    They outlive the job, and a node that has one is never idle: no autoscaler would end it. On a
    local Ray they would not give way if a worker, which comes first, had started them.
    """
    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()
