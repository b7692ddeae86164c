"""Raw Flickr30k on disk, read into one kind of record.

The original layout: a folder of JPEGs and `results_20130124.token`
(`1000092795.jpg#0<TAB>caption`), with the split of Karpathy's `dataset_flickr30k.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_ray.errors import RunError

TOKEN_FILE = "results_20130124.token"
KARPATHY_FILE = "dataset_flickr30k.json"
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """An image that is still a file, with all that is said of it."""

    path: str
    filename: str
    captions: tuple[str, ...] = ()
    label: str | None = None


def read_flickr30k(folder: Path) -> tuple[dict[str, list[Record]], list[str]]:
    """The records of each split in the token file's order, and the images that have no split.

    Raises RunError where the folder does not hold the layout.
    """
    images = _image_folder(folder)
    split_of = _karpathy_split(folder / KARPATHY_FILE)
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    left_out = []
    for filename, captions in _captions(folder / TOKEN_FILE).items():
        split = split_of.get(filename)
        if split is None:
            left_out.append(filename)
        else:
            splits[split].append(Record(str(images / filename), filename, tuple(captions)))
    return splits, left_out


def read_class_folders(folder: Path) -> list[Record]:
    """One record for each image of `folder/CLASS/IMAGE`, labelled with its class, in order."""
    records = [
        Record(str(path), f"{path.parent.name}/{path.name}", label=path.parent.name)
        for path in sorted(folder.glob("*/*"))
        if path.is_file()
    ]
    if not records:
        raise RunError(f"{folder}: holds no images in class folders (data.zero_shot_source)")
    return records


def _captions(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, line in _lines(path):
        name, tab, caption = line.partition("\t")
        filename, hash_sign, _ = name.rpartition("#")
        if not (tab and hash_sign and filename):
            raise RunError(f"{path}:{number}: {line!r} must read NAME.jpg#N<TAB>caption")
        captions.setdefault(filename, []).append(caption.strip())
    return captions


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror} (data.source)") from None
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _karpathy_split(path: Path) -> dict[str, str]:
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        split_of = {image["filename"]: image["split"] for image in images}
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror} (data.source)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: is not Karpathy's JSON: {error!r}") from None
    unknown = set(split_of.values()) - set(SPLITS)
    if unknown:
        raise RunError(f"{path}: holds the split {sorted(unknown)[0]!r}: must be one of {SPLITS}")
    return split_of


def _image_folder(folder: Path) -> Path:
    for name in IMAGE_FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    raise RunError(f"{folder}: holds none of {', '.join(IMAGE_FOLDERS)} (data.source)")
