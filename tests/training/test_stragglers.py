"""The rank that the others wait for is named, in a real run of two ranks."""

from __future__ import annotations

import time
from typing import Any

import pytest
from conftest import override
from process_group import run_ranks

from clip_ray.collectives import rank
from clip_ray.config import Config
from clip_ray.data.prepare import prepare
from clip_ray.pipeline import session
from clip_ray.storage import Storage
from clip_ray.training.stragglers import straggler

# Far above what a machine that is busy otherwise makes of a step.
SLOW_S = 2.0
NODES = ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]


def test_a_slow_rank_is_named_with_its_node() -> None:
    line = straggler([0.2, 0.21, 0.35, 0.2], NODES)
    assert line is not None
    assert "wait for rank 2 on 10.0.0.2: 0.350 s a step by itself, the median 0.205" in line
    assert "(by rank, 2: 0.350, 1: 0.210, 0: 0.200, 3: 0.200)" in line


def test_equal_ranks_are_not() -> None:
    assert straggler([0.2, 0.21, 0.24, 0.2], NODES) is None


def run_with_a_slow_rank(tree: dict[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
    from plain_run import plain_run

    from clip_ray.config_file import parse_config
    from clip_ray.model.clip import CLIP

    forward = CLIP.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        if rank() == 1:
            time.sleep(SLOW_S)
        return forward(*arguments, **options)

    setattr(CLIP, "forward", slow)  # noqa: B010
    ended = plain_run(parse_config(tree, origin="test"))
    assert ended is not None
    return ended.said, ended.log


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(200)
def test_a_slow_rank_of_a_run_is_named(small_config: Config) -> None:
    config = override(small_config, [
        "cluster.num_workers=2", "logging.tensorboard=false", "train.epochs=1",
    ])  # fmt: skip
    with session(config, print):
        prepare(config.data, Storage(config.data_root), print)
    (said, log), _ = run_ranks(2, run_with_a_slow_rank, config.model_dump(mode="json"))
    assert any("wait for rank 1 on here: " in line for line in said)
    assert log[-1]["slowest_rank_s"] > SLOW_S
    assert log[-1]["slowest_rank_s"] > 1.25 * log[-1]["median_rank_s"] > 0
