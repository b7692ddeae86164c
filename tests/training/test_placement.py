"""Where a run's processes are: workers packed or spread, ranks node by node, readers by label."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import override
from ray.cluster_utils import Cluster

from clip_ray.config import Config
from clip_ray.data.prepare import prepare
from clip_ray.errors import RunError
from clip_ray.pipeline import session
from clip_ray.ports import free_ports
from clip_ray.storage import Storage
from clip_ray.training import launch

pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.timeout(300)]
STORE: dict[str, Any] = {"object_store_memory": 200 * 2**20}


@pytest.fixture(scope="module", autouse=True)
def cluster(s3_environment: None) -> Iterator[None]:
    """Two nodes for workers, and one for readers, which is labelled so."""
    head = {"num_cpus": 0, "dashboard_port": free_ports(1)[0], **STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=4, **STORE)
    cluster.add_node(num_cpus=4, labels={"role": "reader"}, **STORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", str(cluster.address))
        yield
    cluster.shutdown()


def looking_worker(folder: Path) -> Callable[[dict[str, Any]], None]:
    """A worker that takes one micro batch, and writes down where it and the readers are."""

    def look(loop_config: dict[str, Any]) -> None:
        import ray.train
        from ray._private.state import actors  # without a dashboard

        from clip_ray.config_file import parse_config
        from clip_ray.data.stream import training_stream
        from clip_ray.data.tokenizer import CaptionTokenizer
        from clip_ray.storage import Storage
        from clip_ray.training.run import TOKENIZER_KEY, make_stream_spec

        config = parse_config(loop_config["config"], origin="test")
        tokenizer_json = Storage(config.run_root).read_bytes(TOKENIZER_KEY).decode()
        tokenizer = CaptionTokenizer(tokenizer_json, config.model.text.context_length)
        rank = ray.train.get_context().get_world_rank()
        # The readers end with the stream.
        stream = training_stream(make_stream_spec(config, tokenizer), rank, range(1000))
        next(stream)
        alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
        seen = {
            "worker": ray.get_runtime_context().get_node_id(),
            "readers": [
                actor["Address"]["NodeID"]
                for actor in alive
                if "MapWorker" in actor["ActorClassName"]
            ],
        }
        (folder / f"{rank}.json").write_text(json.dumps(seen))

    return look


@pytest.fixture
def placed(small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two workers, two of which fit on a node, and a labelled reader for each."""
    monkeypatch.setattr(launch, "train_worker", looking_worker(tmp_path))
    return override(small_config, [
        "cluster.insecure=true", "cluster.cpus_per_worker=1.5", "cluster.readers_per_worker=1",
        "cluster.reader_labels={role: reader}", "cluster.num_workers=2",
    ])  # fmt: skip


def test_ranks_are_node_by_node(placed: Config, tmp_path: Path) -> None:
    with session(placed, print):
        prepare(placed.data, Storage(placed.data_root), print)
        first, second = worker_nodes(override(placed, ["cluster.num_workers=4"]), tmp_path)
        assert first != second


def test_workers_are_packed_or_spread(placed: Config, tmp_path: Path) -> None:
    with session(placed, print):
        prepare(placed.data, Storage(placed.data_root), print)
        assert len(worker_nodes(override(placed, ["name=packed"]), tmp_path)) == 1
        spread = override(placed, ["cluster.placement=spread", "name=spread"])
        assert len(worker_nodes(spread, tmp_path)) == 2


def test_a_run_whose_nodes_do_not_come_says_so_and_ends(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SAY_WAIT_S", 2.0)
    config = override(small_config, [
        "cluster.insecure=true", "cluster.cpus_per_worker=64", "cluster.start_timeout_s=4",
    ])  # fmt: skip
    said: list[str] = []
    with session(config, said.append):
        prepare(config.data, Storage(config.data_root), said.append)
        waits = "waits for 2 workers, each with 64 CPUs and 0 GPUs: the cluster has 12 and 0"
        with pytest.raises(RunError, match=f"{waits}; none came within cluster.start_timeout_s"):
            launch.train(config, said.append)
        assert "train" not in [thread.name for thread in threading.enumerate()]
    assert f"train: {waits}" in said


def worker_nodes(config: Config, folder: Path) -> list[str]:
    """The nodes of the workers by rank, each once: one that comes again would come twice.

    Readers must be where their label is.
    """
    launch.train(config, print)
    seen = [
        json.loads((folder / f"{rank}.json").read_text())
        for rank in range(config.cluster.num_workers)
    ]
    labelled = {node["NodeID"] for node in ray.nodes() if node["Labels"].get("role") == "reader"}
    assert {node for each in seen for node in each["readers"]} == labelled
    nodes = [each["worker"] for each in seen]
    return [node for number, node in enumerate(nodes) if number == 0 or node != nodes[number - 1]]
