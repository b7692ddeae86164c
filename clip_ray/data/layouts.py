"""The public layouts of Flickr30k, and other image-caption sets, read into one kind of entry.

    original      results_20130124.token    1000092795.jpg#0<TAB>Two young guys with …
    kaggle        results.csv               image_name| comment_number| comment
    karpathy      dataset_flickr30k.json    {"images": [{"filename", "split", "sentences"}]}
    huggingface   flickr_annotations_30k.csv    raw (a JSON list), split, filename
    csv, jsonl    any *.csv, *.jsonl        image, caption[, split], one line for each caption
    webdataset    *.tar                     KEY.jpg beside KEY.txt or KEY.json

A line that cannot be understood is a problem of its own, not the end of the job.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

from clip_ray.config import Layout
from clip_ray.data.source import Source
from clip_ray.errors import RunError

KARPATHY_FILE = "dataset_flickr30k.json"
TOKEN_FILES = ("results_20130124.token", "results.token")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
_SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_BROKEN_KAGGLE = re.compile(r"\s*(\d+)\s+(\S.*)")


@dataclass
class Entry:
    """An image by the name that the annotations give it, with all that they say of it."""

    filename: str
    captions: list[str] = field(default_factory=list)
    split: str | None = None


@dataclass
class Annotations:
    """What a layout says: entries in their order, and what could not be understood."""

    layout: str
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # name, reason, detail
    repaired: list[str] = field(default_factory=list)

    def add(self, filename: str, caption: object, split: str | None = None) -> None:
        """One caption of an image, normalised."""
        entry = self.entries.setdefault(filename, Entry(filename, split=split))
        text = _clean(caption)
        if text:
            entry.captions.append(text)


def read_annotations(source: Source, layout: Layout) -> Annotations:
    """The entries of `source` in `layout`, or in the first one that fits. Raises RunError."""
    names = [name for name in get_args(Layout) if name != "auto"] if layout == "auto" else [layout]
    for name in names:
        path = _FINDERS[name](source)
        if path is not None:
            annotations = Annotations(name)
            _READERS[name](source, path, annotations)
            return annotations
    known = ", ".join(name for name in get_args(Layout) if name != "auto")
    raise RunError(
        f"data.source is {source.root!r}: holds no annotations of layout {layout!r}; known are "
        f"{known}"
    )


def karpathy_split(source: Source) -> dict[str, str] | None:
    """The split of each file name by Karpathy's JSON in `source`; None where there is none."""
    path = source.named(KARPATHY_FILE)
    if path is None:
        return None
    images = [image for image in _karpathy_images(source, path) if isinstance(image, dict)]
    return {str(image.get("filename")): str(image.get("split")) for image in images}


def resolve_split(name: str | None) -> str | None:
    """One of SPLITS, restval being train; None where the name is unknown."""
    return _SPLIT_OF.get(str(name))


def _original(source: Source, path: str, found: Annotations) -> None:
    seen: set[str] = set()
    for number, line in _lines(source, path):
        name, tab, caption = line.partition("\t")
        filename, hash_sign, _ = name.rpartition("#")
        if not (tab and hash_sign and filename) or not _is_text(line):
            found.problems.append(
                (f"{path}:{number}", "malformed line", f"{line!r} is not NAME.jpg#N<TAB>caption")
            )
        elif name in seen:
            found.problems.append((filename, "duplicate id", f"{name} is there twice"))
        else:
            seen.add(name)
            found.add(filename, caption)


def _kaggle(source: Source, path: str, found: Annotations) -> None:
    seen: set[tuple[str, str]] = set()
    for number, line in list(_lines(source, path))[1:]:
        parts = [part.strip() for part in line.split("|", 2)]
        if len(parts) == 2 and (match := _BROKEN_KAGGLE.fullmatch(parts[1])):
            parts = [parts[0], *match.groups()]
            found.repaired.append(f"{path}:{number}: a delimiter was missing: {line!r}")
        if len(parts) != 3 or not parts[0] or not _is_text(line):
            found.problems.append(
                (f"{path}:{number}", "malformed line", f"{line!r} is not NAME.jpg| N| caption")
            )
        elif (parts[0], parts[1]) in seen:
            found.problems.append((parts[0], "duplicate id", f"{parts[1]} is there twice"))
        else:
            seen.add((parts[0], parts[1]))
            found.add(parts[0], parts[2])


def _karpathy(source: Source, path: str, found: Annotations) -> None:
    for number, image in enumerate(_karpathy_images(source, path)):
        try:
            filename, split = image["filename"], image["split"]
            captions = [sentence["raw"] for sentence in image["sentences"]]
        except (KeyError, TypeError) as error:
            found.problems.append((f"{path}#{number}", "malformed line", f"lacks {error}"))
            continue
        _add_whole(found, filename, captions, split)


def _huggingface(source: Source, path: str, found: Annotations) -> None:
    for number, row in _csv_rows(source, path):
        try:
            captions = json.loads(row["raw"])
            if not isinstance(captions, list):
                raise TypeError("raw is not a list")
            filename, split = row["filename"], row["split"]
        except (ValueError, KeyError, TypeError) as error:
            found.problems.append((f"{path}:{number}", "malformed line", str(error)))
            continue
        _add_whole(found, filename, captions, split)


def _csv(source: Source, path: str, found: Annotations) -> None:
    for number, row in _csv_rows(source, path):
        _add_pair(found, f"{path}:{number}", row)


def _jsonl(source: Source, path: str, found: Annotations) -> None:
    for number, line in _lines(source, path):
        try:
            row = json.loads(line)
        except ValueError as error:
            found.problems.append((f"{path}:{number}", "malformed line", str(error)))
            continue
        _add_pair(found, f"{path}:{number}", row)


def _webdataset(source: Source, path: str, found: Annotations) -> None:
    for name in source.files:
        key, dot, suffix = name.rpartition(".")
        if not dot or f".{suffix.lower()}" not in IMAGE_SUFFIXES:
            continue
        try:
            captions = _sidecar_captions(source, key)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            found.problems.append((name, "malformed line", f"its caption file: {error}"))
            continue
        _add_whole(found, name, captions, None)


def _sidecar_captions(source: Source, key: str) -> list[Any]:
    if f"{key}.txt" in source.files:
        return [source.files[f"{key}.txt"].read().decode("utf-8")]
    if f"{key}.json" not in source.files:
        return []
    about = json.loads(source.files[f"{key}.json"].read())
    return about["captions"] if "captions" in about else [about["caption"]]


def _add_whole(found: Annotations, filename: str, captions: list[Any], split: str | None) -> None:
    if filename in found.entries:
        found.problems.append((filename, "duplicate id", "the annotations name it twice"))
        return
    found.entries[filename] = Entry(filename, split=split)
    for caption in captions:
        found.add(filename, caption)


def _add_pair(found: Annotations, place: str, row: Any) -> None:
    if not isinstance(row, dict) or not row.get("image") or None in row:
        found.problems.append((place, "malformed line", "needs the fields image and caption"))
        return
    captions = row.get("captions", [row.get("caption")])
    for caption in captions if isinstance(captions, list) else [captions]:
        found.add(row["image"], caption, row.get("split"))


def _lines(source: Source, path: str) -> Iterator[tuple[int, str]]:
    # Bytes that are not UTF-8 become surrogates, so that their line alone is set aside.
    text = source.files[path].read().decode("utf-8-sig", "surrogateescape")
    return ((n, line.rstrip("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _csv_rows(source: Source, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    text = source.files[path].read().decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    return ((reader.line_num, row) for row in reader)


def _karpathy_images(source: Source, path: str) -> list[Any]:
    try:
        return list(json.loads(source.files[path].read())["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{source.root}/{path}: is not Karpathy's JSON: {error!r}") from None


def _clean(caption: object) -> str:
    """NFC, white space as single blanks; empty where there is no text."""
    if not isinstance(caption, str) or not _is_text(caption):
        return ""
    return " ".join(unicodedata.normalize("NFC", caption).split())


def _is_text(line: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in line)


def _columns(source: Source, path: str) -> list[str]:
    head = source.files[path].read()[:4096].decode("utf-8-sig", "replace").split("\n")[0]
    return [column.strip().strip('"') for column in re.split(r"[,|]", head)]


def _find_csv(source: Source) -> str | None:
    tables = [path for path in source.files if path.endswith(".csv")]
    return next(
        (path for path in tables if {"image", "caption"} <= set(_columns(source, path))), None
    )


def _find_tar_pairs(source: Source) -> str | None:
    pairs = (
        path
        for path in source.files
        if path.endswith((".txt", ".json")) and re.search(r"\.(tar|tar\.gz|tgz)/", path)
    )
    return next(pairs, None)


_FINDERS: dict[str, Callable[[Source], str | None]] = {
    "original": lambda source: next(filter(None, map(source.named, TOKEN_FILES)), None),
    "huggingface": lambda source: source.named("flickr_annotations_30k.csv"),
    "kaggle": lambda source: source.named("results.csv"),
    "karpathy": lambda source: source.named(KARPATHY_FILE),
    "csv": _find_csv,
    "jsonl": lambda source: next((p for p in source.files if p.endswith(".jsonl")), None),
    "webdataset": _find_tar_pairs,
}
_READERS: dict[str, Callable[[Source, str, Annotations], None]] = {
    "original": _original,
    "huggingface": _huggingface,
    "kaggle": _kaggle,
    "karpathy": _karpathy,
    "csv": _csv,
    "jsonl": _jsonl,
    "webdataset": _webdataset,
}
