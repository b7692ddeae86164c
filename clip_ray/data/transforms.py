"""From an image to the uint8 square that a tower sees. No torch: it runs in reader tasks."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def random_resized_crop(
    image: Image.Image,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Pixels:
    """A random part of the image, resized: [size, size, 3] uint8.

    Area and aspect are drawn as torchvision's RandomResizedCrop draws them; where ten tries do
    not fit, the largest centred part of an allowed aspect is taken.
    """
    box = _random_box(image.width, image.height, scale, ratio, rng)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def center_crop(
    image: Image.Image, size: int, kind: Literal["open_clip", "hf"] = "open_clip"
) -> Pixels:
    """The shorter side resized to `size`, then the middle: [size, size, 3] uint8.

    `kind` is whose rounding: open_clip's, or that of Hugging Face's CLIP (its PIL backend).
    """
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    if kind == "hf":
        left, top = (width - size) // 2, (height - size) // 2
    else:
        left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
