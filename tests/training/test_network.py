"""Nodes that only a network joins: they train together, and go on where one is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_site import fault_site
from namespace_cluster import NamespaceCluster, why_not

pytestmark = [pytest.mark.alone, pytest.mark.cluster, pytest.mark.s3, pytest.mark.timeout(600)]
OPTIONS = [
    "train.epochs=100000", "checkpoint.every_steps=5", "cluster.hang_timeout_s=10",
    "cluster.min_workers=1",
]  # fmt: skip


@pytest.mark.skipif((reason := why_not()) is not None, reason=str(reason))
def test_a_node_that_is_cut_off_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray Train may ask for the lost node once more, until it is known to be lost.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    with fault_site(tmp_path, OPTIONS, pause_s=0.1, start_cluster=NamespaceCluster) as site:
        addresses = {node.address for node in site.nodes}
        assert len(addresses) == 2
        site.start("networked")
        site.await_step(5)
        assert "train: 2 workers on" in site.said()
        lost = site.nodes.pop()
        site.cluster.cut(lost)
        site.await_said("train: 1 workers on", times=1)
        site.await_step(site.last_step() + 5)
        assert site.stop() == 130
