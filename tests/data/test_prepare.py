"""The prepare job: what cannot be used is set aside with its reason, and nothing is lost."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import raw_sets
from PIL import Image
from raw_sets import as_zip, captions, jpeg

from clip_ray.config import Config
from clip_ray.data.images import decode_rgb
from clip_ray.data.prepare import is_prepared, prepare, requeue
from clip_ray.data.reader import open_reader
from clip_ray.data.shards import read_manifest, read_quarantine
from clip_ray.errors import RunError
from clip_ray.pipeline import session
from clip_ray.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.s3]


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


# Twenty-one broken records: the name in the quarantine, and the reason there.
BAD_FILES = {
    "truncated.jpg": (jpeg(1)[:900], "damaged"),
    "header-only.jpg": (jpeg(1)[:300], "not an image"),
    "truncated.png": (png((90, 90))[:-40], "damaged"),
    "text.jpg": (b"no image at all", "not an image"),
    "page.jpg": (b"<!doctype html><title>404</title>", "not an image"),
    "empty.jpg": (b"", "empty"),
    "bomb.png": (png((3000, 3000)), "too large"),
}
BAD_LINES = [
    "absent.jpg#0\tA caption of an image that is not there .",
    "blank.jpg#0\t   ",
    f"{raw_sets.NAMES[0]}#0\tThe same id once more .",
    "no tab here",
    "no-hash.jpg\tA caption .",
    "twin.jpg#0\tOne name, two files .",
    "elsewhere.jpg#0\tIts split is none .",
    "crc.jpg#0\tIts archive is damaged .",
]
EXPECTED = {
    **{name: reason for name, (_, reason) in BAD_FILES.items()},
    "absent.jpg": "missing image",
    "blank.jpg": "no caption",
    raw_sets.NAMES[0]: "duplicate id",
    "results_20130124.token:52": "malformed line",  # no tab
    "results_20130124.token:53": "malformed line",  # no hash sign
    "results_20130124.token:57": "malformed line",  # not UTF-8
    "more.tar/unnamed.jpg": "no caption",
    "more.tar/../out.jpg": "escapes its archive",
    "more.tar//etc/absolute.jpg": "escapes its archive",
    "more.tar/link.jpg": "escapes its archive",
    "more.tar/hardlink.jpg": "escapes its archive",
    "twin.jpg": "ambiguous image",
    "elsewhere.jpg": "unknown split",
    "crc.jpg": "cannot be read",
}


def broken_set(folder: Path) -> Path:
    files = raw_sets.original()
    for name, (data, _) in BAD_FILES.items():
        files[f"flickr30k-images/{name}"] = data
    for path in ("blank.jpg", "elsewhere.jpg", "a/twin.jpg", "b/twin.jpg"):
        files[f"flickr30k-images/{path}"] = jpeg(7)
    files["crc.zip"] = damaged_zip()
    files["more.tar"] = tar_with_escapes()
    named = [*BAD_FILES, "absent.jpg", "blank.jpg", "twin.jpg", "crc.jpg"]
    split = {**raw_sets.SPLIT, **dict.fromkeys(named, "train"), "elsewhere.jpg": "attic"}
    files["dataset_flickr30k.json"] = raw_sets.karpathy(split)
    lines = [f"{name}#0\t{captions(name)[0]}" for name in BAD_FILES]
    lines = [*raw_sets.token_lines(), *lines, "", *BAD_LINES]
    files["results_20130124.token"] = "\n".join(lines).encode() + b"\nlatin.jpg#0\tcaf\xe9\n"
    return raw_sets.write(folder, files)


def damaged_zip() -> bytes:
    data = bytearray(as_zip({"crc.jpg": np.random.default_rng(0).bytes(5000)}))
    data[2000] ^= 0xFF
    return bytes(data)


def tar_with_escapes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("unnamed.jpg", "../out.jpg", "/etc/absolute.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = len(jpeg())
            archive.addfile(entry, io.BytesIO(jpeg()))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hardlink.jpg", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    return buffer.getvalue()


def with_source(config: Config, source: Path, **fields: object) -> Config:
    data = {"source": str(source), "zero_shot_source": None, "shard_size_mib": 0.01, **fields}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


@pytest.fixture
def cluster(small_config: Config) -> Iterator[None]:
    with session(small_config, print):
        yield


def test_exactly_the_planted_records_are_quarantined(
    small_config: Config, tmp_path: Path, cluster: None
) -> None:
    source = broken_set(tmp_path)
    config = with_source(small_config, source, max_quarantined_share=0.9, max_pixels=10**6)
    storage = Storage(config.data_root)
    manifest = prepare(config.data, storage, print)
    found = read_quarantine(storage)
    assert {entry.name: entry.reason for entry in found} == EXPECTED
    assert len(found) == len(EXPECTED) == manifest.quarantined
    assert {bool(e.sha256) for e in found if e.name in BAD_FILES} == {True}
    rows = sum(manifest.rows(split) for split in manifest.splits)
    assert rows + manifest.quarantined + len(manifest.left_out) == manifest.records
    assert rows == len(raw_sets.NAMES)
    assert read_manifest(storage) == manifest
    for split, shards in manifest.splits.items():
        reader = open_reader(config.data, storage, shards)
        for row in reader.rows(range(len(reader))):
            assert raw_sets.SPLIT[row["filename"]] == split
            assert row["captions"] == captions(row["filename"])
            assert row["image"] == jpeg(raw_sets.NAMES.index(row["filename"]))
    assert list(storage.keys("parts/")) == list(storage.keys("staging/")) == []


def test_repaired_records_are_added_by_requeue(
    small_config: Config, tmp_path: Path, cluster: None
) -> None:
    source = broken_set(tmp_path)
    config = with_source(small_config, source, max_quarantined_share=0.9, max_pixels=10**6)
    storage = Storage(config.data_root)
    before = prepare(config.data, storage, print)
    (source / "flickr30k-images" / "truncated.jpg").write_bytes(jpeg(1))
    (source / "flickr30k-images" / "absent.jpg").write_bytes(jpeg(2))
    after = requeue(config.data, storage, print)
    assert after.quarantined == before.quarantined - 2
    assert after.rows("train") == before.rows("train") + 2
    assert after.splits["train"][: len(before.splits["train"])] == before.splits["train"]
    assert after.sha256 != before.sha256
    names = {entry.name for entry in read_quarantine(storage)}
    assert names == EXPECTED.keys() - {"truncated.jpg", "absent.jpg"}


def test_too_many_broken_records_fail_with_the_reasons_counted(
    small_config: Config, tmp_path: Path, cluster: None
) -> None:
    config = with_source(small_config, broken_set(tmp_path), max_pixels=10**6)
    storage = Storage(config.data_root)
    with pytest.raises(RunError, match=r"21 of 29 records .* 4 escapes its archive, 3 malf"):
        prepare(config.data, storage, print)
    assert not is_prepared(config.data, storage)
    assert len(read_quarantine(storage)) == len(EXPECTED)


def test_a_job_that_was_cut_writes_only_what_is_missing(
    small_config: Config, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_source(small_config, raw_sets.write(tmp_path, raw_sets.original()))
    storage = Storage(config.data_root)
    with monkeypatch.context() as patch:
        patch.setattr("clip_ray.data.prepare._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config.data, storage, print)
    parts = list(storage.keys("parts/"))
    assert len(parts) > 2
    storage.delete(parts[0])
    said: list[str] = []
    manifest = prepare(config.data, storage, said.append)
    assert said[0] == f"prepare: {len(parts) - 1} of {len(parts)} shards are there already"
    assert len(said) == 2
    assert manifest.quarantined == 0
    assert is_prepared(config.data, storage)
    token = tmp_path / "results_20130124.token"
    token.write_text(token.read_text().replace("Caption", "Text"))
    with pytest.raises(RunError, match=r"give data\.name a new value"):
        is_prepared(config.data, storage)


def test_train_images_are_shrunk_and_test_images_keep_their_bytes(
    small_config: Config, tmp_path: Path, cluster: None
) -> None:
    files = raw_sets.original()
    for name in raw_sets.NAMES:
        files[f"flickr30k-images/{name}"] = jpeg(3, size=(500, 375))
    config = with_source(small_config, raw_sets.write(tmp_path, files), shorter_side=256)
    storage = Storage(config.data_root)
    manifest = prepare(config.data, storage, print)
    (train, *_), (test, *_) = (
        list(open_reader(config.data, storage, manifest.splits[split]).rows([0]))
        for split in ("train", "test")
    )
    assert decode_rgb(train["image"]).size == (341, 256)
    assert test["image"] == jpeg(3, size=(500, 375))
