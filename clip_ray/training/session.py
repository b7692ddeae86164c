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
from clip_ray.errors import RunError
from clip_ray.ports import free_ports

# What workers on other nodes need to reach S3. Keys are never among them: nodes have their own.
FORWARDED = (
    "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "DS_ACCELERATOR",
)  # fmt: skip
# How long Ray waits, in its own processes.
TIMEOUTS = {
    # A stream asks that the nodes be kept, every few seconds; what a worker that was killed has
    # asked for is to be forgotten sooner than after three minutes, or idle nodes stay so long.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "60",
    # For workers to leave their process group, before they are killed: one that hangs never does.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}
# Of Ray: the port of the local Ray that is started next.
GCS_PORT = "RAY_GCS_SERVER_PORT"


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
    runtime_env = {"env_vars": _environment(address)}
    arguments: dict[str, Any] = {"runtime_env": runtime_env, "log_to_driver": False}
    if address is None:
        # Readers get CPUs of their own beside the workers', or a small machine would never start;
        # twice, since a link of the stream begins before the last one ends.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        readers_cpus = 2 * READER_CPUS * config.cluster.readers_per_worker
        wanted = config.cluster.num_workers * (config.cluster.cpus_per_worker + readers_cpus) + 1
        arguments |= {
            "num_cpus": max(os.cpu_count() or 1, math.ceil(wanted)),
            "include_dashboard": dashboard,
            "object_store_memory": 2**30,
        }
        if not dashboard:
            # Ray tells a port all the same, where another Ray's may answer; Ray Train asks there
            # whether its controller lives, and ends the workers of one that is not known.
            arguments["dashboard_port"] = free_ports(1)[0]
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a submitted job's runtime_env says already may be said again here.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    try:
        with _sigterm_kept():
            ray.init(address or "local", logging_level=logging.WARNING, **arguments)
    finally:
        os.environ.pop(GCS_PORT, None)
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


def _environment(address: str | None) -> dict[str, str]:
    """What all processes of the job have in theirs."""
    # Ray Train's own actors would look for the cluster they are in, and take another one for it.
    cluster = canonicalize_bootstrap_address_or_die(address) if address else _local_gcs()
    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    return forwarded | TIMEOUTS | {"RAY_ADDRESS": cluster}


def _local_gcs() -> str:
    """The address that the local Ray is going to have."""
    (port,) = free_ports(1)
    os.environ[GCS_PORT] = str(port)
    return f"{ray.util.get_node_ip_address()}:{port}"


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

    They outlive the job, and a node that has one is never idle: no autoscaler would end it.
    """
    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()
