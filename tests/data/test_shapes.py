"""The embedded data set keeps its promises."""

import json
from pathlib import Path

from clip_ray.data.flickr30k import read_class_folders, read_flickr30k
from clip_ray.data.shapes import ShapesSpec, write_shapes

SPEC = ShapesSpec(train=60, val=10, test=20, zero_shot_per_class=1, seed=5)


def test_layout_is_read_as_flickr30k(tmp_path: Path) -> None:
    assert write_shapes(tmp_path, SPEC)
    splits, left_out = read_flickr30k(tmp_path)
    assert {name: len(records) for name, records in splits.items()} == {
        "train": 60,
        "val": 10,
        "test": 20,
    }
    assert left_out == []
    for records in splits.values():
        for record in records:
            assert Path(record.path).exists()
            assert len(set(record.captions)) == 5
    assert len(read_class_folders(tmp_path / "zero-shot")) == 64


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
