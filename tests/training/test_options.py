"""Each line of options in real two-worker runs on shapes: all learn. See test_compiled.py, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_small_config, make_storage, override
from learning import OPTIONS, check_that_it_learns

from clip_ray.config import Config
from clip_ray.pipeline import prepare_data, session


@pytest.fixture(scope="module")
def prepared(
    s3_environment: None, raw_shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Config]:
    """A config whose data are prepared, in a session of Ray, for runs of several names."""
    config = make_small_config(make_storage("options"), raw_shapes, tmp_path_factory.mktemp("ray"))
    with session(config, lambda line: None):
        prepare_data(config, lambda line: None)
        yield config


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(600)
@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "compile"])
def test_every_option_learns(prepared: Config, option: str) -> None:
    check_that_it_learns(override(prepared, [f"name={option}", *OPTIONS[option]]))


@pytest.mark.gpu
@pytest.mark.s3
@pytest.mark.timeout(600)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_learns_on_a_gpu(small_config: Config, option: str) -> None:
    on_gpu = ["cluster.num_workers=1", "cluster.gpus_per_worker=1"]
    config = override(small_config, [*OPTIONS[option], *on_gpu])
    with session(config, lambda line: None):
        prepare_data(config, lambda line: None)
        check_that_it_learns(config)
