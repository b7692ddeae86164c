"""What the facts of nodes are judged to be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clip_ray.cluster.checks import Gpus, MachineFacts
from clip_ray.cluster.findings import Finding, Report
from clip_ray.cluster.judge import (
    Node,
    access_findings,
    clock_findings,
    gpu_findings,
    machine_findings,
    store_findings,
)
from clip_ray.cluster.network import Outcome, pair_findings
from clip_ray.cluster.store_checks import StoreFacts
from clip_ray.config.run import ClusterConfig

GB = 10**9
GPUS = Gpus(visible=2, names=("NVIDIA A10G",) * 2, driver="550.54", nccl="2.27.3")
FACTS = MachineFacts(
    versions={"python": "3.11.7", "ray": "2.60.0"},
    gpus=GPUS,
    disk_path="/tmp/ray",
    disk_bytes=100 * GB,
    disk_free_bytes=50 * GB,
    shared_memory_bytes=20 * GB,
    open_files=65536,
    auth_mode="token",
)
HEAD = Node("head", "a", "10.0.0.1", True, gpus=2, object_store_bytes=10 * GB)
OTHER = replace(HEAD, name="other", node_id="b", address="10.0.0.2", is_head=False)
OWN = FACTS.versions


@pytest.mark.parametrize(
    ("changed", "check", "status"),
    [
        ({}, "versions", "ok"),
        ({"versions": OWN | {"ray": "2.59.0"}}, "versions", "fail"),
        ({"versions": OWN | {"ray": "none"}}, "versions", "fail"),
        ({"gpus": replace(GPUS, visible=1)}, "gpus", "fail"),
        ({"gpus": replace(GPUS, visible=8)}, "gpus", "warn"),
        ({"disk_free_bytes": 4 * GB}, "disk", "fail"),
        ({"disk_free_bytes": 8 * GB}, "disk", "warn"),
        ({"shared_memory_bytes": 64 * 10**6}, "shared memory", "fail"),
        ({"shared_memory_bytes": None}, "shared memory", "ok"),
        ({"open_files": 1024}, "open files", "fail"),
    ],
)
def test_a_machine(changed: dict, check: str, status: str) -> None:
    found = machine_findings(HEAD, replace(FACTS, **changed), OWN)
    assert [each.check for each in found if each.status != "ok"] == [check] * (status != "ok")
    assert {each.check: each.status for each in found}[check] == status


@pytest.mark.parametrize(("workers", "fewest", "status"), [(4, None, "ok"), (5, None, "fail"),
                                                           (5, 3, "ok")])  # fmt: skip
def test_gpus_must_do_for_the_run(workers: int, fewest: int | None, status: str) -> None:
    wanted = ClusterConfig(num_workers=workers, min_workers=fewest, gpus_per_worker=1)
    (found,) = gpu_findings([HEAD, OTHER], [FACTS, FACTS], wanted)
    assert found.status == status
    assert found.seen.startswith("room for 4 workers of 1 GPUs")


def test_gpus_of_other_drivers_are_found() -> None:
    other = replace(FACTS, gpus=replace(GPUS, driver="535.1"))
    (found,) = gpu_findings([HEAD, OTHER], [FACTS, other], None)
    assert found.status == "fail"
    assert found.seen == "driver 535.1, NCCL 2.27.3; driver 550.54, NCCL 2.27.3"


@pytest.mark.parametrize(
    ("ahead_s", "of_store_s", "status"),
    [
        # The driver's own clock may be wrong: what counts is the head's and the store's.
        ({"head": 100.0, "other": 101.0}, {"head": 0.0, "other": 1.0}, "ok"),
        ({"head": 0.0, "other": 8.0}, {}, "warn"),
        ({"head": 0.0, "other": 0.0}, {"other": -1000.0}, "fail"),
    ],
)
def test_clocks(ahead_s: dict[str, float], of_store_s: dict[str, float], status: str) -> None:
    head, other = clock_findings([HEAD, OTHER], ahead_s, of_store_s)
    assert (head.status, other.status) == ("ok", status)


def test_checksums_that_are_off_already_are_no_fault() -> None:
    outcomes: dict[str, str | None] = {"reach": None, "checksums": "411"}
    refused = StoreFacts("http://s3", outcomes, sends_checksums=True)
    assert [each.status for each in store_findings(HEAD, refused)] == ["warn", "ok"]
    told = replace(refused, sends_checksums=False)
    assert [each.status for each in store_findings(HEAD, told)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("mode", "address", "status"),
    [("token", "10.0.0.1", "ok"), ("disabled", "10.0.0.1", "fail"),
     ("disabled", "127.0.0.1", "warn"), ("disabled", "head.internal", "fail")],
)  # fmt: skip
def test_a_token(mode: str, address: str, status: str) -> None:
    facts = {"head": replace(FACTS, auth_mode=mode)}
    (found,) = access_findings([replace(HEAD, address=address)], facts)
    assert found.status == status


FAST, SLOW, CUT = Outcome(1e9), Outcome(1e6), Outcome(None, {"a": "waited", "b": "no such device"})


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ({("a", "b"): CUT, ("b", "c"): CUT, ("c", "a"): FAST}, {"b": "no such device"}),
        ({("a", "b"): SLOW, ("b", "c"): SLOW, ("c", "a"): FAST}, {"b": "0.00 GB/s"}),
        ({("a", "b"): SLOW, ("b", "c"): FAST, ("c", "a"): FAST}, {"a, b": "0.00 GB/s"}),
        ({("a", "b"): FAST, ("b", "c"): FAST, ("c", "a"): FAST}, {"cluster": "0.00 GB/s"}),
    ],
)
def test_who_is_to_blame_for_the_network(pairs: dict, named: dict[str, str]) -> None:
    found = pair_findings(["a", "b", "c"], pairs, "gloo", whole=SLOW)
    assert {each.node: each.seen for each in found} == {
        name: f"all-reduce (gloo): {seen}" for name, seen in named.items()
    }
    assert all(each.status == "fail" and each.advice for each in found)


def test_a_report_tells_of_nodes_that_are_alike_in_one_line() -> None:
    alike = [Finding(name, "disk", "ok", "room") for name in ("a", "b")]
    odd = Finding("b", "clock", "warn", "+8 s from the head's", "set its clock")
    report = Report(["a", "b"], [*alike, odd], bytes_per_s=2.5e9)
    assert report.table().splitlines() == [
        "ok    all 2 nodes  disk   room",
        "warn  b            clock  +8 s from the head's",
        "      -> set its clock",
    ]
    assert report.as_json()["gb_per_s"] == 2.5
    assert report.as_json()["ok"]
