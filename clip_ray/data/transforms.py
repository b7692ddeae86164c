"""From an image to the uint8 square that a tower sees. No torch: it runs in reader tasks."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from clip_ray.config import DataConfig

Pixels = NDArray[np.uint8]


def augment(pixels: Pixels, size: int, config: DataConfig, rng: np.random.Generator) -> Pixels:
    """A training view of [H, W, 3] pixels, as open_clip draws it: [size, size, 3] uint8.

    Crop, then flip, colour jitter and grey with their probabilities.
    """
    image = random_resized_crop(pixels, size, config.crop_scale, config.crop_ratio, rng)
    if rng.random() < config.flip_prob:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < config.color_jitter_prob:
        image = _color_jitter(image, config.color_jitter, rng)
    if rng.random() < config.grey_prob:
        image = image.convert("L").convert("RGB")
    return np.asarray(image)


def random_resized_crop(
    pixels: Pixels,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Image.Image:
    """A random part of [H, W, 3] pixels, resized to `size` × `size`.

    Area and aspect are drawn as torchvision's RandomResizedCrop draws them; where ten tries do
    not fit, the largest centred part of an allowed aspect is taken.
    """
    left, top, right, bottom = _random_box(pixels.shape[1], pixels.shape[0], scale, ratio, rng)
    part = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    return part.resize((size, size), Image.Resampling.BICUBIC)


def _color_jitter(
    image: Image.Image,
    strength: tuple[float, float, float, float],
    rng: np.random.Generator,
) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter."""
    low = [max(0.0, 1 - strength[0]), max(0.0, 1 - strength[1]), max(0.0, 1 - strength[2])]
    factors = [*rng.uniform(low, [1 + s for s in strength[:3]]), rng.uniform(-1, 1) * strength[3]]
    for kind in rng.permutation(4).tolist():
        image = adjust_color(image, kind, float(factors[kind]))
    return image


def adjust_color(image: Image.Image, kind: int, factor: float) -> Image.Image:
    """One change of an RGB image: 0 brightness, 1 contrast, 2 saturation, 3 hue (-0.5 to 0.5)."""
    if kind < 3:
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
        return enhance(image).enhance(factor)
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(factor * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


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
