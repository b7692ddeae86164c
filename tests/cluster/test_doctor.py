"""`clip-ray doctor`: real clusters, a healthy one, and planted faults that are found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from picky_s3 import no_checksums, no_conditions, no_multipart, picky_s3, read_only
from small_cluster import SmallCluster, small_cluster

from clip_ray.config_file import shipped
from clip_ray.ports import free_ports
from clip_ray.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.timeout(600)]
ROOT = "s3://clip-ray-tests/doctor"
CONFIG = [
    str(shipped("jobs/configs/shapes.yaml")), f"storage.root={ROOT}", "storage.embedded_dir=null",
]  # fmt: skip
Findings = dict[tuple[str, str], dict[str, Any]]  # by node and check
UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
CAN_MOUNT = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
# A disk of 200 MB with 195 in use where Ray's temporary files go, a tiny /dev/shm, few open files.
SMALL_DISKS = (
    'mkdir -p "$0" && mount -t tmpfs -o size=200m none "$0" && fallocate -l 195m "$0/full" && '
    "mount -t tmpfs -o size=64m none /dev/shm && "
)
FEW_FILES = 'ulimit -n 1000 && exec "$@"'
# What Python runs at its start: this node's clock is 20 minutes fast.
FAST_CLOCK = "import time\ntrue_time = time.time\ntime.time = lambda: true_time() + 1200\n"


@pytest.fixture(scope="module")
def s3(s3_environment: None) -> dict[str, str]:
    """What the environment of a node with the right S3 holds."""
    Storage(ROOT).create_bucket()
    own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    # A session in this process, of another test, leaves these behind.
    return {name: value for name, value in own.items() if "CHECKSUM" not in name}


@pytest.fixture(scope="module")
def cluster(s3: dict[str, str]) -> Iterator[SmallCluster]:
    """Two healthy nodes: `head` and `well`."""
    with small_cluster(s3, with_token=True) as cluster:
        cluster.add("well", s3)
        yield cluster


def findings(done: subprocess.CompletedProcess[str]) -> Findings:
    assert done.stdout, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"] == (done.returncode == 0)
    return {(found["node"], found["check"]): found for found in report["findings"]}


def wrong(found: Findings, node: str) -> dict[str, str]:
    """The checks of a node that are not right, each with its status; all have their advice."""
    of_node = {check: each for (name, check), each in found.items() if name == node}
    for each in of_node.values():
        assert (each["status"] != "ok") == bool(each["advice"])
        assert "\n" not in each["advice"]
    return {check: each["status"] for check, each in of_node.items() if each["status"] != "ok"}


def test_a_healthy_cluster_passes(cluster: SmallCluster) -> None:
    done = cluster.doctor(*CONFIG, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(done)
    assert all(each["status"] == "ok" for each in found.values())
    assert "all 2 nodes" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["gb_per_s"] > 0
    assert list(Storage(ROOT).keys()) == []  # what was tried is gone


def test_faults_of_a_node_are_found_and_named(
    cluster: SmallCluster, s3: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "timm-0.9.0.dist-info").mkdir()
    (tmp_path / "timm-0.9.0.dist-info" / "METADATA").write_text("Name: timm\nVersion: 0.9.0\n")
    (tmp_path / "sitecustomize.py").write_text(FAST_CLOCK)
    planted = {
        "PYTHONPATH": f"{tmp_path}:{cluster.environment['PYTHONPATH']}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}",
        "GLOO_SOCKET_IFNAME": "missing0",
    }
    disks = SMALL_DISKS if CAN_MOUNT else ""
    shell = ["sh", "-c", disks + FEW_FILES, str(cluster.ray_folder)]
    before = [*UNSHARE, *shell] if CAN_MOUNT else shell
    cluster.add("ill", s3 | planted, before, ["--num-gpus=1"])
    done = cluster.doctor(*CONFIG, "--json")
    cluster.stop("ill")
    found = findings(done)
    expected = dict.fromkeys(
        ["versions", "gpus", "open files", "s3 reach", "clock", "network"], "fail"
    )
    if CAN_MOUNT:
        expected |= {"disk": "fail", "shared memory": "fail"}
    assert wrong(found, "ill") == expected, done.stdout
    assert not wrong(found, "head") and not wrong(found, "well"), done.stdout
    assert found["ill", "versions"]["seen"].startswith("timm 0.9.0, not ")
    assert found["ill", "gpus"]["seen"] == "1 offered by Ray, 0 visible to torch"
    assert "+1200 s from the head's" in found["ill", "clock"]["seen"]
    assert found["ill", "open files"]["seen"] == "ulimit -n is 1000"
    assert "missing0" in found["ill", "network"]["seen"]
    assert done.returncode == 1
    assert f"{len(expected)} checks failed" in done.stderr


def test_a_node_that_hangs_is_found(cluster: SmallCluster, s3: dict[str, str]) -> None:
    cluster.add("frozen", s3)
    cluster.freeze("frozen")
    done = cluster.doctor("--json", start_timeout_s=15)
    cluster.stop("frozen")
    found = findings(done)
    assert wrong(found, "frozen") == {"process": "fail"}, done.stdout
    assert found["frozen", "process"]["seen"] == "no answer within 15 s"
    assert not wrong(found, "head") and not wrong(found, "well"), done.stdout


def test_faults_of_stores_and_a_cluster_without_a_token_are_found(s3: dict[str, str]) -> None:
    stores = {
        "read-only": read_only, "no-multipart": no_multipart, "no-checksums": no_checksums,
        "no-conditions": no_conditions,
    }  # fmt: skip
    with ExitStack() as stack:
        cluster = stack.enter_context(small_cluster(s3, with_token=False))
        for name, rule in stores.items():
            url = stack.enter_context(picky_s3(s3["AWS_ENDPOINT_URL"], rule))
            cluster.add(name, s3 | {"AWS_ENDPOINT_URL": url})
        cluster.add("wrong-keys", s3 | {"AWS_SECRET_ACCESS_KEY": "wrong"})
        done = cluster.doctor(*CONFIG, "--json")
    found = findings(done)
    assert not wrong(found, "head"), done.stdout
    assert wrong(found, "read-only") == {"s3 write": "fail"}, done.stdout
    assert "AccessDenied" in found["read-only", "s3 write"]["seen"]
    assert wrong(found, "no-multipart") == {"s3 multipart": "fail"}, done.stdout
    assert wrong(found, "no-conditions") == {"s3 conditional put": "fail"}, done.stdout
    assert wrong(found, "no-checksums") == {"s3 checksums": "warn"}, done.stdout
    advice = found["no-checksums", "s3 checksums"]["advice"]
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in advice
    assert wrong(found, "wrong-keys") == {"s3 reach": "fail"}, done.stdout
    assert wrong(found, "cluster") == {"token": "fail"}
    assert "ShadowRay" in found["cluster", "token"]["seen"]
    assert list(Storage(ROOT).keys()) == []


def test_the_address_is_the_heads() -> None:
    arguments = ["doctor", "--address", "http://127.0.0.1:8265"]
    done = subprocess.run(
        [sys.executable, "-m", "clip_ray", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "must be its head's, HOST:PORT" in done.stderr
    assert "clip-ray submit doctor CONFIG" in done.stderr
