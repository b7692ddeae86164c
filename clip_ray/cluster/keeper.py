"""The process that keeps a local cluster: its S3 server and its head, until it is told to end.

`python -m clip_ray.cluster.keeper FOLDER`, started by `local.start`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from clip_ray.cluster.nodes import RAY, head_tags
from clip_ray.cluster.processes import HEAD, end_nodes, remember
from clip_ray.config import StorageConfig
from clip_ray.embedded_s3 import embedded_folder, storage_session
from clip_ray.errors import RunError
from clip_ray.ports import free_ports

START_TIMEOUT_S = 120
# Fields that Ray's schema wants of every cluster; nodes of this machine need none of them.
UNUSED: dict[str, Any] = {
    "auth": {}, "docker": {}, "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
    "worker_start_ray_commands": [], "file_mounts": {}, "cluster_synced_files": [],
    "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
}  # fmt: skip


def main(folder: Path) -> None:
    """Runs the cluster of `folder`/cluster.yaml until SIGTERM, or until its head ends."""
    signal.signal(signal.SIGTERM, _interrupt)
    with (
        contextlib.suppress(KeyboardInterrupt),
        _storage(folder.parent / "s3"),
        # Ray's sockets lie below this folder, and their paths may have 107 characters at most.
        tempfile.TemporaryDirectory(prefix="clip-ray-", ignore_cleanup_errors=True) as ray_folder,
        _head(folder, Path(ray_folder)) as head,
    ):
        head.wait()


def _storage(folder: Path) -> contextlib.AbstractContextManager[object]:
    """The embedded server with the demo's bucket, where AWS_ENDPOINT_URL names no other."""
    config = StorageConfig(root="s3://clip-ray", embedded_dir=str(folder))
    return storage_session(config) if embedded_folder(config) else contextlib.nullcontext()


@contextlib.contextmanager
def _head(folder: Path, ray_folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    gcs, dashboard, client, agent = free_ports(4)
    nodes = folder / "nodes"
    shutil.rmtree(nodes, ignore_errors=True)
    nodes.mkdir()
    config = yaml.safe_load((folder / "cluster.yaml").read_text()) | UNUSED
    config["provider"] |= {"folder": str(nodes), "gcs_address": f"127.0.0.1:{gcs}"}
    resolved = folder / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(config))
    head_type = config["head_node_type"]
    head = subprocess.Popen(
        [
            str(RAY), "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--port={gcs}", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            "--min-worker-port=0", "--max-worker-port=0",
            f"--num-cpus={config['available_node_types'][head_type]['resources']['CPU']}",
            "--object-store-memory=200000000",
            f"--temp-dir={ray_folder}", f"--autoscaling-config={resolved}",
        ],
        env=os.environ | _environment(folder, head_type),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    remember(nodes / f"{HEAD}.json", head.pid, tags=head_tags(head_type))
    try:
        _await_dashboard(dashboard, head)
        address = folder / "address.json"
        remember(address, os.getpid(), gcs=f"127.0.0.1:{gcs}",
                 dashboard=f"http://127.0.0.1:{dashboard}")  # fmt: skip
        yield head
    finally:
        (folder / "address.json").unlink(missing_ok=True)
        end_nodes(nodes)


def _environment(folder: Path, head_type: str) -> dict[str, str]:
    """What the head and its nodes are started with."""
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_NODE_TYPE_NAME": head_type,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        # A job's command is found beside this interpreter.
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    }


def _await_dashboard(port: int, head: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and head.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/gcs_healthz", timeout=2).close()
            return
        time.sleep(0.2)
    raise RunError(f"the head did not start within {START_TIMEOUT_S} s")


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(Path(sys.argv[1]))
