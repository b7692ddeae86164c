"""What Ray's autoscaler starts for a run's workers and readers, by its own scheduler."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import manifests
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).parents[2]
WORKER: dict[str, float] = {"CPU": 2, "GPU": 1}
LABEL_OPERATOR_IN = 1  # of Ray's LabelSelectorOperator
READER: dict[str, float] = {"CPU": 1}
pytestmark = pytest.mark.timeout(60)


def aws() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "raycluster" / "aws.yaml").read_text())


def kubernetes() -> dict[str, Any]:
    """What the autoscaler beside the head derives from the RayCluster."""
    (cluster,) = [m for m in manifests("cluster") if m["kind"] == "RayCluster"]
    return _derive_autoscaling_config_from_ray_cr(cluster)


def started(
    config: dict[str, Any],
    demand: dict[str, float],
    count: int,
    role: str | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, int]:
    """How many nodes of each type come up, where the types of `without` have just been refused."""
    resolved = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    labels = [[("clip-ray/role", LABEL_OPERATOR_IN, [role])]] if role else None
    demands = [ResourceRequestUtil.make(demand, label_selectors=labels)] * count
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=resolved.get_node_type_configs(),
            max_num_nodes=resolved.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(demands),
            recoverable_resource_availabilities=dict.fromkeys(without, 0.0),
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_workers_get_spot_nodes_first_on_aws() -> None:
    assert started(aws(), WORKER, 8) == {"gpu-g6-spot": 2}


def test_where_spot_is_refused_the_next_type_is_taken_on_aws() -> None:
    g6, g5 = "gpu-g6-spot", "gpu-g5-spot"
    assert started(aws(), WORKER, 8, without=(g6,)) == {"gpu-g5-spot": 2}
    assert started(aws(), WORKER, 8, without=(g6, g5)) == {"gpu-g6": 2}


def test_a_run_on_p5_keeps_the_other_types_out() -> None:
    config = aws()
    for name in ("gpu-g6-spot", "gpu-g5-spot", "gpu-g6"):
        config["available_node_types"][name]["max_workers"] = 0
    assert started(config, WORKER, 16) == {"gpu-p5-spot": 2}


def test_workers_get_spot_pods_first_on_kubernetes() -> None:
    assert started(kubernetes(), WORKER, 8) == {"gpu-spot": 2}
    assert started(kubernetes(), WORKER, 8, without=("gpu-spot",)) == {"gpu-on-demand": 2}


@pytest.mark.parametrize("config", [aws, kubernetes], ids=["aws", "kubernetes"])
def test_readers_get_nodes_without_gpus(config: Any) -> None:
    assert started(config(), READER, 20) == {"readers": 2}
    assert started(config(), READER, 20, role="reader") == {"readers": 2}


@pytest.mark.parametrize("config", [aws, kubernetes], ids=["aws", "kubernetes"])
def test_the_head_offers_nothing(config: Any) -> None:
    head = config()["available_node_types"][config()["head_node_type"]]
    assert head["resources"].get("CPU") == 0 and "GPU" not in head["resources"]
