"""Raw data as records: each image with its place, captions and split, and what cannot be one."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clip_ray.config import DataConfig
from clip_ray.data.layouts import (
    IMAGE_SUFFIXES,
    SPLITS,
    Annotations,
    Entry,
    karpathy_split,
    read_annotations,
    resolve_split,
)
from clip_ray.data.shards import SCHEMA_VERSION, Quarantined
from clip_ray.data.source import ARCHIVES, FileRef, Source, list_files, open_archives
from clip_ray.errors import RunError
from clip_ray.storage import Storage

ZERO_SHOT_SPLIT = "zero_shot"
_ANNOTATIONS = (".token", ".csv", ".json", ".jsonl")


@dataclass(frozen=True)
class RawRecord:
    """An image that is still a file, with all that is said of it."""

    image_id: int
    filename: str
    image: FileRef
    captions: tuple[str, ...] = ()
    label: str | None = None

    def as_row(self) -> dict[str, Any]:
        """The columns of a shard, the image still a place."""
        return {**asdict(self), "captions": list(self.captions)}


@dataclass
class Raw:
    """All that a source holds. `records` counts every one, usable or not."""

    layout: str
    splits: dict[str, list[RawRecord]] = field(default_factory=dict)
    quarantined: list[Quarantined] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def records(self) -> int:
        """Images and problems, before any image is opened."""
        usable = sum(map(len, self.splits.values()))
        return usable + len(self.quarantined) + len(self.left_out)


def read_raw(config: DataConfig, staging: Storage) -> Raw:
    """The records of `config.source`, in the annotations' order, ids from 0. Raises RunError."""
    listed = _without_zero_shot(list_files(_root(config)), config)
    source = open_archives(listed, staging)
    annotations = read_annotations(source, config.layout)
    raw = Raw(annotations.layout, {split: [] for split in SPLITS}, repaired=annotations.repaired)
    for name, reason, detail in annotations.problems:
        raw.quarantined.append(_problem(name, None, reason, detail))
    for name in source.escaped:
        raw.quarantined.append(_problem(name, None, "escapes its archive", "a link, or .. in it"))
    _place(annotations, source, config, raw)
    if config.zero_shot_source:
        raw.splits[ZERO_SHOT_SPLIT] = read_class_folders(config.zero_shot_source)
    return raw


def read_class_folders(folder: str) -> list[RawRecord]:
    """One record for each image of `folder/CLASS/IMAGE`, labelled with its class, in order."""
    records = [
        RawRecord(number, path, ref, label=path.split("/")[0])
        for number, (path, ref) in enumerate(list_files(folder).files.items())
        if path.count("/") == 1
    ]
    if not records:
        raise RunError(f"data.zero_shot_source is {folder!r}: no images in class folders are there")
    return records


def fingerprint(config: DataConfig) -> str:
    """Of the annotations, of the archives' sizes, and of the settings that shape the shards."""
    settings = f"{SCHEMA_VERSION} {config.model_dump_json(exclude=_FREE)}"
    digest = hashlib.sha256(f"{settings} {bool(config.zero_shot_source)}".encode())
    for path, ref in list_files(_root(config)).files.items():
        if path.lower().endswith(ARCHIVES):
            digest.update(f"{path} {ref.size_bytes}".encode())
        elif path.lower().endswith(_ANNOTATIONS):
            digest.update(ref.read())
    return digest.hexdigest()


# What may differ without the shards being others.
_FREE = {
    "name", "source", "zero_shot_source", "max_quarantined_share",
    "crop_scale", "crop_ratio", "flip_prob", "color_jitter", "color_jitter_prob", "grey_prob",
    "captions_per_image", "shuffle_window_rows", "cache_dir", "cache_mib",
}  # fmt: skip


def _root(config: DataConfig) -> str:
    if config.source is None:
        raise RunError("data.source is null: name the folder or archive with the raw data set")
    return config.source


def _without_zero_shot(source: Source, config: DataConfig) -> Source:
    """Class folders may lie within the source; they are not images without captions."""
    if config.zero_shot_source and not source.root.startswith("s3://"):
        zero_shot = Path(config.zero_shot_source).resolve()
        source.files = {
            path: ref
            for path, ref in source.files.items()
            if not Path(ref.container).is_relative_to(zero_shot)
        }
    return source


def _place(annotations: Annotations, source: Source, config: DataConfig, raw: Raw) -> None:
    """Each entry into its split, the left out, or the quarantine; then images without an entry."""
    images = _images_by_name(source)
    split_of = _split_of(annotations, source, config)
    used: set[str] = set()
    for image_id, entry in enumerate(annotations.entries.values()):
        found = _find(images, entry.filename)
        used |= set(found)
        split = split_of.get(entry.filename)
        if split is None:
            raw.left_out.append(entry.filename)
        elif problem := _problem_of(entry, found, split):
            raw.quarantined.append(problem)
        else:
            record = RawRecord(
                image_id, entry.filename, source.files[found[0]], tuple(entry.captions)
            )
            raw.splits[str(resolve_split(split))].append(record)
    for paths in images.values():
        for path in paths:
            if path not in used:
                raw.quarantined.append(_problem(path, None, "no caption", "no annotation names it"))


def _problem_of(entry: Entry, found: Sequence[str], split: str) -> Quarantined | None:
    if resolve_split(split) is None:
        return _problem(entry.filename, split, "unknown split", f"{split!r} is none of {SPLITS}")
    if not found:
        return _problem(entry.filename, split, "missing image", "no file of that name")
    if len(found) > 1:
        return _problem(entry.filename, split, "ambiguous image", ", ".join(found))
    if not entry.captions:
        return _problem(entry.filename, split, "no caption", "no caption with text in it")
    return None


def _problem(name: str, split: str | None, reason: str, detail: str) -> Quarantined:
    safe = [text.encode("utf-8", "backslashreplace").decode() for text in (name, detail)]
    return Quarantined(name=safe[0], split=split, reason=reason, detail=safe[1], sha256=None)


def _images_by_name(source: Source) -> dict[str, list[str]]:
    images: dict[str, list[str]] = collections.defaultdict(list)
    for path in source.files:
        if path.lower().endswith(IMAGE_SUFFIXES):
            images[PurePosixPath(path).name].append(path)
    return images


def _find(images: dict[str, list[str]], filename: str) -> list[str]:
    """The paths that an annotation's name can mean: it may come with or without its folders."""
    paths = images.get(PurePosixPath(filename).name, [])
    return [path for path in paths if f"/{path}".endswith(f"/{filename}")]


def _split_of(annotations: Annotations, source: Source, config: DataConfig) -> dict[str, str]:
    """Names that are missing here have no split."""
    entries = annotations.entries
    if any(entry.split is not None for entry in entries.values()):
        return {name: entry.split for name, entry in entries.items() if entry.split is not None}
    by_karpathy = karpathy_split(source)
    if by_karpathy is not None:
        return by_karpathy
    return {name: _seeded_split(name, config) for name in entries}


def _seeded_split(filename: str, config: DataConfig) -> str:
    digest = hashlib.sha256(f"{config.split_seed} {filename}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < config.val_share:
        return "val"
    return "test" if share < config.val_share + config.test_share else "train"
