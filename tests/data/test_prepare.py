"""The prepare job: what cannot be used is set aside and listed, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_ray.config import Config
from clip_ray.data.prepare import is_prepared, prepare
from clip_ray.data.shards import ShardReader, read_manifest
from clip_ray.data.transforms import decode_rgb
from clip_ray.errors import RunError
from clip_ray.pipeline import session
from clip_ray.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.s3]


@pytest.fixture
def config(small_config: Config, raw_shapes: Path, tmp_path: Path) -> Config:
    """`small_config` over a copy of the raw data that a test may damage."""
    source = shutil.copytree(raw_shapes, tmp_path / "raw")
    data = {"source": str(source), "zero_shot_source": str(source / "zero-shot")}
    return small_config.model_copy(update={"data": small_config.data.model_copy(update=data)})


@pytest.fixture
def cluster(config: Config) -> Iterator[None]:
    with session(config, print):
        yield


def test_broken_images_are_listed_and_the_rest_is_all_there(config: Config, cluster: None) -> None:
    storage = Storage(config.data_root)
    images = sorted((Path(config.data.source or "") / "flickr30k-images").glob("*.jpg"))
    images[3].write_bytes(images[3].read_bytes()[:200])
    images[7].unlink()
    manifest = prepare(config.data, storage, print)
    assert {item.filename for item in manifest.rejected} == {images[3].name, images[7].name}
    assert all(item.reason for item in manifest.rejected)
    rows = sum(manifest.rows(split) for split in ("train", "val", "test"))
    assert rows + len(manifest.rejected) == len(images)
    assert is_prepared(config.data, storage)
    assert read_manifest(storage) == manifest
    reader = ShardReader(storage, manifest.splits["train"], cache_bytes=2**20)
    assert len(reader) == manifest.rows("train")
    for row in reader.rows([0, len(reader) - 1, 1]):
        assert len(row["captions"]) == 5
        assert decode_rgb(row["image"]).size == (72, 72)


def test_too_many_broken_images_end_the_job_without_a_manifest(
    config: Config, cluster: None
) -> None:
    storage = Storage(config.data_root)
    for image in (Path(config.data.source or "") / "flickr30k-images").glob("*.jpg"):
        image.write_bytes(b"no image")
    with pytest.raises(RunError, match=r"176 of 240 images cannot be used, more than 1%"):
        prepare(config.data, storage, print)
    assert not is_prepared(config.data, storage)


def test_other_data_under_the_same_name_is_an_error(config: Config, cluster: None) -> None:
    storage = Storage(config.data_root)
    prepare(config.data, storage, print)
    token_file = Path(config.data.source or "") / "results_20130124.token"
    token_file.write_text(token_file.read_text().replace("red", "crimson"))
    with pytest.raises(RunError, match=r"give data.name a new value"):
        is_prepared(config.data, storage)
