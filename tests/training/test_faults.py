"""Real faults in a real cluster: the run goes on, and ends as if there had been none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import override
from fault_site import NODE, fault_site
from faults import FAULTS, drain
from sample_log import samples

pytestmark = [
    pytest.mark.alone,
    pytest.mark.cluster,
    pytest.mark.s3,
    pytest.mark.timeout(1200),
]
OPTIONS = ["train.epochs=100000", "checkpoint.every_steps=5", "cluster.hang_timeout_s=8"]
# What the driver must have said of each; the soak (tests/bench/soak.py) compares all of them.
SAID = {
    "worker killed": "failed: ",
    "worker stopped": "hanging",
    "worker out of memory": "failed: MemoryError",
    "worker told to end": "a worker was told to end; the run goes on from step",
    "controller killed": "Ray Train's controller has died",
    "node killed": "failed: ",
    "driver killed": "was not given back; waiting",
    "store full": "is not saved: ",
}


def test_faults_one_after_the_other_change_nothing(tmp_path: Path) -> None:
    with fault_site(tmp_path, OPTIONS, pause_s=0.1) as site:
        site.start("faulty")
        site.await_step(1)
        for kind, said in SAID.items():
            before = site.said().count(said)
            FAULTS[kind](site)
            site.await_said(said, times=before + 1)
            site.await_step(site.last_step() + 1)
        assert site.stop() == 130
        assert site.left_behind() == []
        last, faulty = site.newest_step(), site.newest_state()
        site.start("reference", stop_at=last, pause_s=0.0)
        assert site.await_end() == 0
        reference = site.newest_state()
        assert samples(site.ids("faulty")) == samples(site.ids("reference"))
    assert faulty.keys() == reference.keys()
    assert all(torch.equal(faulty[name], reference[name]) for name in faulty)


def test_a_run_shrinks_with_its_cluster_and_grows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray Train may ask for the lost node once more, until it is known to be lost.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    elastic = [*OPTIONS, "cluster.min_workers=1"]
    with fault_site(tmp_path, elastic, pause_s=0.1) as site:
        site.start("elastic")
        site.await_step(5)
        site.cluster.remove_node(site.nodes.pop(), allow_graceful=False)
        site.await_step(site.last_step() + 5)
        site.nodes.append(site.cluster.add_node(**NODE))
        site.await_said("train: 2 workers on", times=2)
        site.await_step(site.last_step() + 1)
        assert site.stop() == 130
        sizes = re.findall(r"train: (\d) workers? on", site.said())
        assert sizes == ["2", "1", "2"]
        last, seen = site.newest_step(), samples(site.ids("elastic"))
        site.config = override(site.config, ["cluster.min_workers=null"])
        site.start("reference", stop_at=last, pause_s=0.0)
        assert site.await_end() == 0
        assert seen == samples(site.ids("reference"))


def test_a_node_that_is_to_go_is_left_at_a_checkpoint(tmp_path: Path) -> None:
    options = [*OPTIONS, "checkpoint.every_steps=null", "checkpoint.every_epochs=null"]
    with fault_site(tmp_path, options, pause_s=0.1) as site:
        site.start("drained")
        site.await_new_step(10)
        site.nodes.append(site.cluster.add_node(**NODE))
        drain(site, site.nodes[0], deadline_s=15)
        site.await_step(1)
        site.await_said("is about to go", times=1)
        site.await_said("train: 2 workers on", times=2)
        assert re.search(r"from step [1-9]\d*", site.said())
        assert site.stop() == 130
