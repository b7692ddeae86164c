"""What the nodes' facts mean for a run: pure functions from facts to findings."""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from clip_ray.cluster.checks import MachineFacts
from clip_ray.cluster.findings import CLUSTER, Finding, Status
from clip_ray.cluster.store_checks import CHECKSUMS, StoreFacts
from clip_ray.config.run import ClusterConfig

# Ray writes no object to a disk that is fuller (RAY_local_fs_capacity_threshold).
DISK_FULL = 0.95
# Below it Ray itself warns of failing connections.
OPEN_FILES = 4096
SKEW_WARN_S, SKEW_FAIL_S = 5, 900  # S3 refuses a signature that is 15 minutes off
STORE_ADVICE = {
    "reach": "check AWS_ENDPOINT_URL, the keys or IAM role, and the network on this node",
    "write": "allow its keys or IAM role s3:PutObject below storage.root",
    "read": "allow its keys or IAM role s3:GetObject below storage.root",
    "conditional put": "take a store that honours If-None-Match and If-Match: a run's lease is "
    "kept by them",
    "multipart": "take a store with multipart uploads, or allow its keys to use them",
    "checksums": f"set {CHECKSUMS}=when_required for all programs beside clip-ray, which sets it",
    "delete": "allow its keys or IAM role s3:DeleteObject below storage.root",
}


@dataclass(frozen=True)
class Node:
    """What Ray says of a node."""

    name: str
    node_id: str
    address: str
    is_head: bool
    gpus: float
    object_store_bytes: float


def machine_findings(node: Node, facts: MachineFacts, own: Mapping[str, str]) -> list[Finding]:
    """Of one node: versions, against the driver's `own`, GPUs, disk, shared memory and limits."""
    return [
        _versions(node, facts, own),
        _gpus(node, facts),
        _disk(node, facts),
        _shared_memory(node, facts),
        _open_files(node, facts),
    ]


def _versions(node: Node, facts: MachineFacts, own: Mapping[str, str]) -> Finding:
    other = {name: found for name, found in facts.versions.items() if found != own.get(name)}
    if not other:
        shown = ", ".join(f"{name} {found}" for name, found in facts.versions.items())
        return Finding(node.name, "versions", "ok", shown)
    shown = ", ".join(f"{name} {found}, not {own.get(name)}" for name, found in other.items())
    advice = "install there what the driver has: requirements.lock, and the same clip-ray"
    return Finding(node.name, "versions", "fail", shown, advice)


def _gpus(node: Node, facts: MachineFacts) -> Finding:
    gpus = facts.gpus
    shown = f"{node.gpus:g} offered by Ray, {gpus.visible} visible to torch"
    if gpus.names:
        shown += f": {gpus.names[0]}, driver {gpus.driver}, NCCL {gpus.nccl}"
    if gpus.visible == node.gpus:
        return Finding(node.name, "gpus", "ok", shown)
    if gpus.visible > node.gpus:
        advice = "start the node with --num-gpus of all, or hide the others by CUDA_VISIBLE_DEVICES"
        return Finding(node.name, "gpus", "warn", shown, advice)
    advice = "install the driver and a CUDA build of torch, or start it with fewer --num-gpus"
    return Finding(node.name, "gpus", "fail", shown, advice)


def _disk(node: Node, facts: MachineFacts) -> Finding:
    shown = f"{_gb(facts.disk_free_bytes)} of {_gb(facts.disk_bytes)} free in {facts.disk_path}"
    if facts.disk_free_bytes < (1 - DISK_FULL) * facts.disk_bytes:
        advice = "free space there: Ray spills nothing to a disk that is more than 95 % full"
        return Finding(node.name, "disk", "fail", shown, advice)
    if facts.disk_free_bytes < node.object_store_bytes:
        advice = f"let an object store of {_gb(node.object_store_bytes)} have room to spill"
        return Finding(node.name, "disk", "warn", shown, advice)
    return Finding(node.name, "disk", "ok", f"room to spill in {facts.disk_path}")


def _shared_memory(node: Node, facts: MachineFacts) -> Finding:
    if facts.shared_memory_bytes is None:
        return Finding(node.name, "shared memory", "ok", "this system has no /dev/shm")
    if facts.shared_memory_bytes >= node.object_store_bytes:
        return Finding(node.name, "shared memory", "ok", "the object store fits in /dev/shm")
    shown = f"/dev/shm of {_gb(facts.shared_memory_bytes)} for an object store of "
    shown += _gb(node.object_store_bytes)
    advice = "enlarge /dev/shm (docker run --shm-size), or lower --object-store-memory"
    return Finding(node.name, "shared memory", "fail", shown, advice)


def _open_files(node: Node, facts: MachineFacts) -> Finding:
    shown = f"ulimit -n is {facts.open_files}"
    if facts.open_files >= OPEN_FILES:
        return Finding(node.name, "open files", "ok", shown)
    advice = "raise it before ray start: ulimit -n 65536"
    return Finding(node.name, "open files", "fail", shown, advice)


def gpu_findings(
    nodes: Iterable[Node], facts: Iterable[MachineFacts], wanted: ClusterConfig | None
) -> list[Finding]:
    """Of the GPUs of all nodes: that they are alike, and enough for the run's workers."""
    found = []
    kinds = {f"driver {f.gpus.driver}, NCCL {f.gpus.nccl}" for f in facts if f.gpus.visible}
    if len(kinds) > 1:
        advice = "install the same driver and torch on all nodes"
        found.append(Finding(CLUSTER, "gpus", "fail", "; ".join(sorted(kinds)), advice))
    if wanted and wanted.gpus_per_worker:
        workers = wanted.min_workers or wanted.num_workers
        room = sum(int(node.gpus / wanted.gpus_per_worker) for node in nodes)
        shown = f"room for {room} workers of {wanted.gpus_per_worker:g} GPUs; the run needs "
        shown += str(workers)
        if room < workers:
            advice = "start the missing nodes, or lower cluster.num_workers"
            found.append(Finding(CLUSTER, "gpus", "fail", shown, advice))
        else:
            found.append(Finding(CLUSTER, "gpus", "ok", shown))
    return found


def clock_findings(
    nodes: Sequence[Node], ahead_s: Mapping[str, float], of_store_s: Mapping[str, float]
) -> list[Finding]:
    """Of clocks, each so much ahead of the driver's, and of the store's, by the node's name."""
    heads = [ahead_s[node.name] for node in nodes if node.is_head and node.name in ahead_s]
    head_s = heads[0] if heads else statistics.median_low(list(ahead_s.values()) or [0.0])
    found = []
    for name, value_s in ahead_s.items():
        offsets_s = {"the head's": value_s - head_s}
        if name in of_store_s:
            offsets_s["the store's"] = of_store_s[name]
        worst_s = max(map(abs, offsets_s.values()))
        if worst_s <= SKEW_WARN_S:
            shown = f"within {SKEW_WARN_S} s of {' and '.join(offsets_s)}"
            found.append(Finding(name, "clock", "ok", shown))
            continue
        shown = ", ".join(f"{value:+.0f} s from {other}" for other, value in offsets_s.items())
        status: Status = "fail" if worst_s > SKEW_FAIL_S else "warn"
        advice = "set its clock and keep it with chrony; S3 refuses one that is 15 minutes off"
        found.append(Finding(name, "clock", status, shown, advice))
    return found


def store_findings(node: Node, facts: StoreFacts) -> list[Finding]:
    """Of what S3 lets the node do."""
    found = []
    for operation, reason in facts.outcomes.items():
        if reason is None:
            continue
        check, advice = f"s3 {operation}", STORE_ADVICE[operation]
        if operation != "checksums":
            found.append(Finding(node.name, check, "fail", reason, advice))
        elif facts.sends_checksums:
            found.append(
                Finding(node.name, check, "warn", f"of the SDKs by default: {reason}", advice)
            )
        else:
            shown = f"{CHECKSUMS}=when_required is set, and needed"
            found.append(Finding(node.name, check, "ok", shown))
    if done := [operation for operation, reason in facts.outcomes.items() if reason is None]:
        shown = f"{', '.join(done)} at {facts.endpoint}"
        found.append(Finding(node.name, "s3", "ok", shown))
    return found


def access_findings(nodes: Sequence[Node], facts: Mapping[str, MachineFacts]) -> list[Finding]:
    """Of who gets in: nobody without a token, where the cluster is reached from elsewhere."""
    unguarded = [name for name, found in facts.items() if found.auth_mode != "token"]
    if not unguarded:
        return [Finding(CLUSTER, "token", "ok", "RAY_AUTH_MODE is token")]
    elsewhere = [node.address for node in nodes if not _is_loopback(node.address)]
    shown = f"RAY_AUTH_MODE is not token on {', '.join(unguarded)}"
    advice = "start all nodes with RAY_AUTH_MODE=token and one token in RAY_AUTH_TOKEN_PATH"
    if not elsewhere:
        return [Finding(CLUSTER, "token", "warn", f"{shown}; reached from here only", advice)]
    shown += f": whoever reaches {elsewhere[0]} runs any code there (ShadowRay)"
    return [Finding(CLUSTER, "token", "fail", shown, advice)]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
