"""The nodes of a local cluster: processes of this machine that Ray's autoscaler starts and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from clip_ray.cluster.processes import end, recall, remember

RAY = Path(sys.executable).with_name("ray")


def head_tags(node_type: str) -> dict[str, str]:
    """The tags of the node that the cluster was started with."""
    return {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
        TAG_RAY_USER_NODE_TYPE: node_type,
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }


class LocalNodes(NodeProvider):
    """Each node is a `ray start` in a process group of its own, kept in the file `ID.json`.

    Of the cluster's YAML: `provider.folder` holds these files, `provider.gcs_address` is the
    head's. Ray calls the methods from several threads.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._gcs_address = provider_config["gcs_address"]
        self._lock = threading.RLock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """The nodes that run and have these tags."""
        found = []
        for file in sorted(self._folder.glob("*.json")):
            tags = self.node_tags(file.stem)
            if tags and tag_filters.items() <= tags.items():
                found.append(file.stem)
        return found

    def is_running(self, node_id: str) -> bool:
        """Whether the node's process is there."""
        with self._lock:
            if child := self._children.get(node_id):
                child.poll()
        return recall(self._file(node_id)) is not None

    def is_terminated(self, node_id: str) -> bool:
        """Whether the node's process is gone."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """The node's tags; none where it has ended."""
        with self._lock:
            kept = recall(self._file(node_id)) if self.is_running(node_id) else None
            return kept[1]["tags"] if kept else {}

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Lays tags over those of the node."""
        with self._lock:
            if kept := recall(self._file(node_id)):
                process, facts = kept
                remember(self._file(node_id), process.pid, tags=facts["tags"] | tags)

    def internal_ip(self, node_id: str) -> str:
        """All nodes are this machine's."""
        return "127.0.0.1"

    def external_ip(self, node_id: str) -> str:
        """All nodes are this machine's."""
        return "127.0.0.1"

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Starts `count` nodes that offer `resources`."""
        for _ in range(count):
            node_id = f"node-{uuid.uuid4().hex[:8]}"
            child = self._start(node_id, tags, dict(resources), labels)
            with self._lock:
                self._children[node_id] = child
                node_tags = tags | {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
                remember(self._file(node_id), child.pid, tags=node_tags)

    def terminate_node(self, node_id: str) -> None:
        """Ends the node's processes."""
        if kept := recall(self._file(node_id)):
            end(kept[0])
        with self._lock:
            if child := self._children.pop(node_id, None):
                child.poll()
            self._file(node_id).unlink(missing_ok=True)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Nothing has to be made before the nodes."""
        return cluster_config

    def _file(self, node_id: str) -> Path:
        return self._folder / f"{node_id}.json"

    def _start(
        self,
        node_id: str,
        tags: dict[str, str],
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> subprocess.Popen[bytes]:
        command = [
            str(RAY), "start", f"--address={self._gcs_address}", "--block",
            "--disable-usage-stats", "--node-ip-address=127.0.0.1",
            f"--num-cpus={int(resources.pop('CPU', 0))}",
            f"--num-gpus={int(resources.pop('GPU', 0))}",
            # Those of several nodes of a machine must not meet.
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        if store_bytes := resources.pop("object_store_memory", None):
            command.append(f"--object-store-memory={int(store_bytes)}")
        if memory_bytes := resources.pop("memory", None):
            command.append(f"--memory={int(memory_bytes)}")
        # The autoscaler knows a node by what it says of itself.
        identity = {
            "RAY_CLOUD_INSTANCE_ID": node_id,
            "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
        }
        command += [f"--resources={json.dumps(resources)}"]
        command += [f"--labels={','.join(f'{name}={value}' for name, value in labels.items())}"]
        with (self._folder / f"{node_id}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                env=os.environ | identity,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
