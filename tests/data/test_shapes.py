"""The embedded data set keeps its promises."""

import json
from pathlib import Path

from clip_ray.config import DataConfig
from clip_ray.data.records import read_class_folders, read_raw
from clip_ray.data.shapes import ShapesSpec, write_shapes
from clip_ray.storage import Storage

SPEC = ShapesSpec(train=60, val=10, test=20, zero_shot_per_class=1, seed=5)


def test_layout_is_read_as_flickr30k(tmp_path: Path) -> None:
    assert write_shapes(tmp_path, SPEC)
    zero_shot = tmp_path / "zero-shot"
    config = DataConfig(name="x", source=str(tmp_path), zero_shot_source=str(zero_shot))
    raw = read_raw(config, Storage("s3://unused"))
    assert {name: len(records) for name, records in raw.splits.items()} == {
        "train": 60,
        "val": 10,
        "test": 20,
        "zero_shot": 64,
    }
    assert (raw.left_out, raw.quarantined, raw.layout) == ([], [], "original")
    for split in ("train", "val", "test"):
        for record in raw.splits[split]:
            assert Path(record.image.container).exists()
            assert len(set(record.captions)) == 5
    assert len(read_class_folders(str(zero_shot))) == 64


def test_same_seed_same_bytes_and_a_second_call_writes_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shapes(tmp_path / name, SPEC)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    assert not write_shapes(tmp_path / "a", SPEC)


def test_no_caption_is_shared_between_splits(tmp_path: Path) -> None:
    write_shapes(tmp_path, SPEC)
    images = json.loads((tmp_path / "dataset_flickr30k.json").read_text())["images"]
    owners: dict[str, set[str]] = {}
    for image in images:
        for sentence in image["sentences"]:
            owners.setdefault(sentence["raw"], set()).add(image["split"])
    assert all(len(splits) == 1 for splits in owners.values())
