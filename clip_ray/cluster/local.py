"""A real Ray cluster on this machine, with a head, a token and nodes that come and go."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clip_ray.cluster.processes import end, end_nodes, recall, remember
from clip_ray.config_file import read_yaml
from clip_ray.errors import ConfigError, RunError

FOLDER = Path(".clip-ray") / "cluster"
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 90
PROVIDER = "clip_ray.cluster.nodes.LocalNodes"


@dataclass(frozen=True)
class LocalCluster:
    """Where a running cluster is reached."""

    gcs: str
    dashboard: str
    token_file: str

    def environment(self) -> dict[str, str]:
        """What Ray's own commands and `clip-ray` need to use the cluster."""
        return {
            "RAY_ADDRESS": self.gcs,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_file,
        }


def start(path: Path, fewest: int | None, most: int | None, folder: Path = FOLDER) -> LocalCluster:
    """Starts the cluster of a YAML file; the S3 server of `folder`'s parent runs as long.

    The server is started where AWS_ENDPOINT_URL names none. Raises ConfigError or RunError.
    """
    if running(folder):
        raise RunError(f"a cluster runs already in {folder}; clip-ray cluster stop ends it")
    config = cluster_config(path, fewest, most)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stop(folder)  # what a killed keeper has left
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    log_path = folder / "keeper.log"
    with log_path.open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "clip_ray.cluster.keeper", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    remember(folder / "keeper.json", keeper.pid)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while keeper.poll() is None and time.monotonic() < deadline_s:
        if cluster := running(folder):
            return cluster
        time.sleep(0.2)
    stop(folder)
    tail = log_path.read_text(errors="replace").strip().splitlines()[-1:]
    raise RunError(f"the cluster did not start: {' '.join(tail)} ({log_path} has all)")


def running(folder: Path = FOLDER) -> LocalCluster | None:
    """The cluster that runs in `folder`, if one does."""
    if kept := recall(folder / "address.json"):
        facts = kept[1]
        return LocalCluster(facts["gcs"], facts["dashboard"], str(folder.resolve() / "token"))
    return None


def stop(folder: Path = FOLDER) -> bool:
    """Ends the cluster in `folder` and nothing else; False if there was none."""
    kept = recall(folder / "keeper.json")
    if kept:
        end(kept[0], grace_s=STOP_TIMEOUT_S)
    end_nodes(folder / "nodes")
    return kept is not None


def cluster_config(path: Path, fewest: int | None, most: int | None) -> dict[str, Any]:
    """A cluster's YAML, with between `fewest` and `most` nodes of its worker type.

    Raises ConfigError.
    """
    config = read_yaml(path, "fields such as `provider:`")
    if config.get("provider", {}).get("module") != PROVIDER:
        raise ConfigError(
            f"{path}: provider.module must be {PROVIDER}; other clusters are started by `ray up`"
        )
    types = config["available_node_types"]
    worker_types = [name for name in types if name != config["head_node_type"]]
    if len(worker_types) != 1:
        raise ConfigError(
            f"{path}: available_node_types must hold one type beside the head's, "
            f"not {len(worker_types)}"
        )
    worker = types[worker_types[0]]
    worker["min_workers"] = worker.get("min_workers", 0) if fewest is None else fewest
    worker["max_workers"] = worker.get("max_workers", 0) if most is None else most
    if worker["min_workers"] > worker["max_workers"]:
        raise ConfigError(
            f"{path}: min_workers is {worker['min_workers']}: must be at most max_workers "
            f"({worker['max_workers']}); give --min, --max or both"
        )
    config["max_workers"] = worker["max_workers"]
    return config
