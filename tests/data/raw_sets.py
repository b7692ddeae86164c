"""Small raw data sets in every public layout and container, as their publishers lay them out."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = [f"{1000092795 + i}.jpg" for i in range(8)]
SPLIT = dict(zip(NAMES, ["train"] * 5 + ["val"] + ["test"] * 2, strict=True))
Files = dict[str, bytes]


def jpeg(seed: int = 0, size: tuple[int, int] = (60, 50)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def captions(name: str) -> list[str]:
    return [f"Caption {i} of {name}, with a comma and a café ." for i in range(5)]


def images(folder: str) -> Files:
    return {f"{folder}{name}": jpeg(seed) for seed, name in enumerate(NAMES)}


def karpathy(names: Mapping[str, str] = SPLIT) -> bytes:
    entries = [
        {
            "filename": name, "imgid": i, "split": split, "sentids": list(range(5 * i, 5 * i + 5)),
            "sentences": [{"raw": c, "tokens": c.split(), "sentid": 5 * i + j, "imgid": i}
                          for j, c in enumerate(captions(name))],
        }
        for i, (name, split) in enumerate(names.items())
    ]  # fmt: skip
    return json.dumps({"images": entries, "dataset": "flickr30k"}).encode()


def token_lines() -> list[str]:
    return [f"{name}#{i}\t{text}" for name in NAMES for i, text in enumerate(captions(name))]


def original() -> Files:
    token = "\n".join(token_lines()).encode() + b"\n"
    return {
        **images("flickr30k-images/"),
        "results_20130124.token": token,
        "dataset_flickr30k.json": karpathy(),
    }


def kaggle() -> Files:
    rows = ["image_name| comment_number| comment"]
    rows += [f"{name}| {i}| {text}" for name in NAMES for i, text in enumerate(captions(name))]
    # The real file has one row without its second delimiter.
    rows[7] = rows[7].replace("| 1| ", "| 1   ")
    return {
        **images("flickr30k_images/"),
        "flickr30k_images/results.csv": "\n".join(rows).encode(),
        "dataset_flickr30k.json": karpathy(),
    }


def only_karpathy() -> Files:
    return {**images("images/"), "dataset_flickr30k.json": karpathy()}


def huggingface() -> Files:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for i, name in enumerate(NAMES):
        writer.writerow([json.dumps(captions(name)), "[]", SPLIT[name], name, i])
    return {
        "flickr30k-images.zip": as_zip(images("flickr30k-images/")),
        "flickr_annotations_30k.csv": table.getvalue().encode(),
    }


def pairs_csv() -> Files:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["image", "caption", "split"])
    writer.writeheader()
    for name in NAMES:
        for text in captions(name):
            writer.writerow({"image": f"pictures/{name}", "caption": text, "split": SPLIT[name]})
    return {**images("pictures/"), "pairs.csv": table.getvalue().encode()}


def pairs_jsonl() -> Files:
    rows = [{"image": n, "captions": captions(n), "split": SPLIT[n]} for n in NAMES]
    return {**images(""), "pairs.jsonl": "\n".join(map(json.dumps, rows)).encode()}


def webdataset() -> Files:
    members: Files = {}
    for seed, name in enumerate(NAMES):
        key = name.removesuffix(".jpg")
        members[f"{key}.jpg"] = jpeg(seed)
        members[f"{key}.json"] = json.dumps({"captions": captions(name)}).encode()
    return {"00000.tar": as_tar(members)}


LAYOUTS = {
    "original": original,
    "kaggle": kaggle,
    "karpathy": only_karpathy,
    "huggingface": huggingface,
    "csv": pairs_csv,
    "jsonl": pairs_jsonl,
    "webdataset": webdataset,
}


def as_zip(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def as_tar(files: Files, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def as_tar_gz(files: Files) -> bytes:
    return as_tar(files, "w:gz")


def write(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
