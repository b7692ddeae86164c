"""Photograph-like JPEGs for benches: 500×375, 120 to 150 KB each, made from a seed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
TEXTURES = 24


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
    fine = rng.normal(0, 27, (HEIGHT, WIDTH, 1))
    return (fine + rng.normal(0, 5, (HEIGHT, WIDTH, 3))).astype(np.int16)
