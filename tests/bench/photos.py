"""Photograph-like JPEGs for benches: 500×375, 120 to 150 KB each, made from a seed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
TEXTURES = 24
# Mean and deviation of the logarithm of a caption's words: 12.4 ± 5.2.
LOG_LENGTH = 2.44, 0.40
WORDS = ["a", "two", "man", "dog", "red", "street", "snow", "on", "with", "near"]
HELD_OUT = 8  # images each of val and test, which no bench reads


def photos(count: int) -> Iterator[bytes]:
    """`count` different JPEGs: a soft scene of its own below one of a few fine textures."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        scene = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels = np.asarray(scene).astype(np.int16) + texture(number % TEXTURES)
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
        yield buffer.getvalue()


@lru_cache(maxsize=TEXTURES)
def texture(number: int) -> np.ndarray:
    rng = np.random.default_rng(1000 + number)
    fine = rng.normal(0, 28.5, (HEIGHT, WIDTH, 1))
    return (fine + rng.normal(0, 5, (HEIGHT, WIDTH, 3))).astype(np.int16)


def caption(number: int) -> str:
    """As long as those of Flickr30k: some twelve words, one in a hundred above thirty."""
    rng = np.random.default_rng(number)
    length = int(np.clip(rng.lognormal(*LOG_LENGTH), 3, 70))
    return " ".join(rng.choice(WORDS, length)) + " ."


def write_raw_set(folder: Path, count: int) -> list[bytes]:
    """A raw folder of `count` train images, with a few of val and test; returns the train JPEGs."""
    (folder / "images").mkdir(parents=True)
    jpegs = list(photos(count + 2 * HELD_OUT))
    splits = ["train"] * count + ["val"] * HELD_OUT + ["test"] * HELD_OUT
    with (folder / "pairs.jsonl").open("w") as table:
        for number, (jpeg, split) in enumerate(zip(jpegs, splits, strict=True)):
            name = f"{number:06d}.jpg"
            (folder / "images" / name).write_bytes(jpeg)
            row = {"image": name, "caption": caption(number), "split": split}
            table.write(json.dumps(row) + "\n")
    return jpegs[:count]
