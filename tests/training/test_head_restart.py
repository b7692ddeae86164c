"""The cluster's head dies and comes back, its state in Redis: training goes on."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fault_site import fault_site
from namespace_cluster import NamespaceCluster, Redis, why_not
from sample_log import samples

from clip_ray.ports import free_ports

pytestmark = [
    pytest.mark.alone,
    pytest.mark.cluster,
    pytest.mark.s3,
    pytest.mark.timeout(600),
    pytest.mark.skipif((reason := why_not()) is not None, reason=str(reason)),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here"),
]
OPTIONS = ["train.epochs=100000", "checkpoint.every_steps=5", "cluster.hang_timeout_s=20"]


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[Redis]:
    (port,), password = free_ports(1), "only-a-test"
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with subprocess.Popen(
        [*command, "--requirepass", password], stdout=subprocess.DEVNULL
    ) as server:
        try:
            yield Redis(f"127.0.0.1:{port}", password)
        finally:
            server.kill()


def test_training_outlives_the_head(tmp_path: Path) -> None:
    with (
        redis(tmp_path) as state,
        fault_site(tmp_path, OPTIONS, 0.1, partial(NamespaceCluster, state)) as site,
    ):
        site.driver_prefix = site.nodes[0].inside
        site.start("kept")
        site.await_step(5)
        site.cluster.kill_head()
        site.await_new_step(site.last_step() + 2)  # nobody has to be asked for a step
        site.cluster.start_head()
        site.await_step(site.last_step() + 10)
        assert site.said().count("train: 2 workers on") == 1
        assert site.driver is not None
        assert site.driver.poll() is None
        assert site.stop() == 130
        seen = samples(site.ids("kept"))
    assert sorted(seen) == list(range(len(seen)))
