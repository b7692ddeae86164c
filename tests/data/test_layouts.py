"""Every layout, in every container, local and in S3, gives the same records and no problem."""

from __future__ import annotations

from pathlib import Path

import pytest
import raw_sets
from raw_sets import LAYOUTS, NAMES, SPLIT, as_tar, as_tar_gz, as_zip, captions

from clip_ray.config import DataConfig
from clip_ray.data.records import Raw, read_raw
from clip_ray.errors import RunError
from clip_ray.storage import Storage

pytestmark = pytest.mark.s3
# Those that hold archives already are published as folders only.
PACKED = {"set.zip": as_zip, "set.tar": as_tar, "set.tar.gz": as_tar_gz}

CASES = [(layout, "folder") for layout in LAYOUTS] + [
    (layout, container)
    for layout in LAYOUTS
    if layout not in ("huggingface", "webdataset")
    for container in PACKED
]


def read(source: str | Path, storage: Storage, **fields: object) -> Raw:
    config = DataConfig.model_validate({"name": "x", "source": str(source), **fields})
    return read_raw(config, storage.below("staging"))


def check(raw: Raw, layout: str, split: bool = True) -> None:
    assert raw.layout == layout
    assert raw.quarantined == []
    assert raw.left_out == []
    found = [(split, record) for split, records in raw.splits.items() for record in records]
    assert sorted(record.filename.rpartition("/")[2] for _, record in found) == NAMES
    for name, record in found:
        base = record.filename.rpartition("/")[2]
        assert list(record.captions) == captions(base)
        assert record.image.read() == raw_sets.jpeg(NAMES.index(base))
        assert record.image_id == NAMES.index(base)
        assert not split or name == SPLIT[base]


@pytest.mark.parametrize(("layout", "container"), CASES)
def test_layouts_are_found_and_read(
    layout: str, container: str, tmp_path: Path, storage: Storage
) -> None:
    files = LAYOUTS[layout]()
    if container == "folder":
        source = raw_sets.write(tmp_path, files)
    else:
        source = tmp_path / container
        source.write_bytes(PACKED[container]({f"flickr30k/{n}": d for n, d in files.items()}))
    raw = read(source, storage)
    check(raw, layout, split=layout != "webdataset")
    assert len(raw.repaired) == (1 if layout == "kaggle" else 0)


@pytest.mark.parametrize("container", ["folder", *PACKED])
def test_sources_in_s3(container: str, storage: Storage) -> None:
    files = raw_sets.original()
    if container == "folder":
        for name, data in files.items():
            storage.write_bytes(f"raw/{name}", data)
        storage.write_bytes("raw-of-another/x.jpg", b"")
        check(read(storage.uri("raw"), storage), "original")
    else:
        storage.write_bytes(container, PACKED[container](files))
        check(read(storage.uri(container), storage), "original")


def test_without_any_split_a_seeded_one_that_is_a_function_of_the_name(
    tmp_path: Path, storage: Storage
) -> None:
    files = raw_sets.original()
    del files["dataset_flickr30k.json"]
    source = raw_sets.write(tmp_path, files)
    shares = {"val_share": 0.3, "test_share": 0.3}
    split_of = []
    for _ in range(2):
        raw = read(source, storage, **shares)
        split_of.append({r.filename: split for split, rs in raw.splits.items() for r in rs})
    assert split_of[0] == split_of[1]
    assert set(split_of[0].values()) == {"train", "val", "test"}
    assert split_of[0] != {
        r.filename: split
        for split, rs in read(source, storage, split_seed=1, **shares).splits.items()
        for r in rs
    }


def test_images_that_karpathy_leaves_out_are_listed(tmp_path: Path, storage: Storage) -> None:
    files = raw_sets.original()
    files["dataset_flickr30k.json"] = raw_sets.karpathy({n: SPLIT[n] for n in NAMES[1:]})
    raw = read(raw_sets.write(tmp_path, files), storage)
    assert raw.left_out == NAMES[:1]
    assert raw.quarantined == []
    assert raw.records == len(NAMES)


def test_what_is_not_there_or_not_known_is_said(tmp_path: Path, storage: Storage) -> None:
    with pytest.raises(RunError, match="nothing is there"):
        read(tmp_path / "nowhere", storage)
    (tmp_path / "x.jpg").write_bytes(raw_sets.jpeg())
    with pytest.raises(
        RunError, match=r"holds no annotations of layout 'auto'; known are original"
    ):
        read(tmp_path, storage)
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(RunError, match=r"broken\.zip: cannot be read as an archive"):
        read(tmp_path, storage)
