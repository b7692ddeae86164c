"""A session on a machine that has another Ray too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
from conftest import SHAPES_YAML
from ray.cluster_utils import Cluster
from ray.exceptions import RayTaskError

from clip_ray.config_file import load_config
from clip_ray.priority import COMES_FIRST, NICENESS
from clip_ray.training.session import ray_session

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture
def another_ray() -> Iterator[Cluster]:
    """It is the one that Ray's files on this machine name, and its dashboard has Ray's own port."""
    arguments = {"num_cpus": 1, "object_store_memory": 200 * 2**20, "include_dashboard": True}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    yield cluster
    cluster.shutdown()


@ray.remote(num_cpus=0)
def nodes_found() -> list[str]:
    """By Ray's state API, with which Ray Train watches its controller."""
    from ray.util.state import list_nodes

    return [str(vars(node)["node_id"]) for node in list_nodes()]


def test_what_runs_in_a_session_finds_its_own_cluster(another_ray: Cluster) -> None:
    config = load_config(SHAPES_YAML, ["storage.root=s3://not-used"])
    with ray_session(config, dashboard=True):
        assert ray.get(nodes_found.remote()) == [node["NodeID"] for node in ray.nodes()]


def test_a_session_without_a_dashboard_takes_no_other_for_its_own(another_ray: Cluster) -> None:
    config = load_config(SHAPES_YAML, ["storage.root=s3://not-used"])
    with ray_session(config), pytest.raises(RayTaskError, match="StateApi"):
        ray.get(nodes_found.remote())


def test_a_local_ray_starts_no_worker_before_there_is_work() -> None:
    """It would lack the job's environment, and idle beside those that have it.

    Ray Data's actors are work: a worker that starts for one of them has not idled.
    """
    config, before = load_config(SHAPES_YAML, ["storage.root=s3://not-used"]), dict(os.environ)
    with ray_session(config):
        time.sleep(2)
        found: list[Any] = ray.util.list_named_actors(all_namespaces=True)
        actors = [ray.get_actor(**one) for one in found]
        assert len(ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=60)) == 3
        names = [" ".join(one.cmdline()[:3]) for one in psutil.Process().children(recursive=True)]
        assert not [name for name in names if "ray::IDLE" in name or "default_worker.py" in name]
        assert "REPORTER_UPDATE_INTERVAL_MS" not in os.environ.keys() - before.keys()


@ray.remote(num_cpus=0)
def niceness() -> int:
    return os.nice(0)


def test_what_reads_and_trains_on_a_local_ray_comes_before_what_waits() -> None:
    config = load_config(SHAPES_YAML, ["storage.root=s3://not-used"])
    first: Any = niceness.options(runtime_env={"env_vars": COMES_FIRST})
    with ray_session(config):
        assert ray.get([niceness.remote(), first.remote()]) == [NICENESS, 0]
