"""Fixtures that many tests share: the real, embedded S3 server, and a small prepared data set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from s3_server import s3_server

from clip_ray.config import Config
from clip_ray.config_file import load_config, parse_config, set_field
from clip_ray.data.shapes import ShapesSpec, write_shapes
from clip_ray.storage import Storage

SHAPES_YAML = Path(__file__).parent.parent / "jobs" / "configs" / "shapes.yaml"


def override(config: Config, overrides: Sequence[str]) -> Config:
    """The same config with `section.field=value` laid over it."""
    tree = config.model_dump(mode="json")
    for dotted, value in (item.split("=", 1) for item in overrides):
        set_field(tree, dotted, yaml.safe_load(value))
    return parse_config(tree, origin="test")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real server for the whole session, named by the environment."""
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        patch = pytest.MonkeyPatch()
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
        patch.undo()


@pytest.fixture
def storage(s3_environment: None, request: pytest.FixtureRequest) -> Storage:
    """An empty place in a real bucket, one for each test."""
    return make_storage(request.node.name)


def make_storage(name: str) -> Storage:
    """An empty place in a bucket of the server that the environment names."""
    name = "".join(c if c.isalnum() else "-" for c in name)
    storage = Storage(f"s3://clip-ray-tests/{name}-{os.getpid()}")
    storage.create_bucket()
    return storage


@pytest.fixture(scope="session")
def raw_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in the raw layout: 128 train, 16 val, 32 test images."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, ShapesSpec(train=128, val=16, test=32, zero_shot_per_class=1))
    return folder


@pytest.fixture
def small_config(storage: Storage, raw_shapes: Path, tmp_path: Path) -> Config:
    """The shapes config over `raw_shapes` and `storage`: two epochs of four steps."""
    return make_small_config(storage, raw_shapes, tmp_path)


def make_small_config(storage: Storage, raw_shapes: Path, folder: Path) -> Config:
    """What `small_config` is, for fixtures that live longer."""
    return load_config(
        SHAPES_YAML,
        [
            f"storage.root={storage.root}",
            f"data.source={raw_shapes}",
            f"data.zero_shot_source={raw_shapes / 'zero-shot'}",
            "data.row_group_rows=8",
            "data.shuffle_window_rows=64",
            f"data.cache_dir={folder / 'cache'}",
            "train.global_batch=32",
            "train.epochs=2",
            "optim.warmup_steps=2",
            "logging.every_steps=1",
            "checkpoint.keep_last=2",
        ],
    )
