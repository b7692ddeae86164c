"""From an image to the uint8 square that a tower sees."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from clip_ray.config import DataConfig
from clip_ray.data.images import Pixels
from clip_ray.data.resize import resize


def augment(pixels: Pixels, size: int, config: DataConfig, rng: np.random.Generator) -> Pixels:
    """A training view of [H, W, 3] pixels, as open_clip draws it: [size, size, 3] uint8.

    Crop, then flip, colour jitter and grey with their probabilities.
    """
    view = random_resized_crop(pixels, size, config.crop_scale, config.crop_ratio, rng)
    if rng.random() < config.flip_prob:
        view = view[:, ::-1]
    if rng.random() < config.color_jitter_prob:
        view = _color_jitter(view, config.color_jitter, rng)
    if rng.random() < config.grey_prob:
        view = np.asarray(Image.fromarray(view).convert("L").convert("RGB"))
    return view


def random_resized_crop(
    pixels: Pixels,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Pixels:
    """A random part of [H, W, 3] pixels, resized: [size, size, 3] uint8.

    Area and aspect are drawn as torchvision's RandomResizedCrop draws them; where ten tries do
    not fit, the largest centred part of an allowed aspect is taken.
    """
    left, top, right, bottom = random_box(pixels.shape[1], pixels.shape[0], scale, ratio, rng)
    return resize(pixels[top:bottom, left:right], size, size)


def _color_jitter(
    view: Pixels, strength: tuple[float, float, float, float], rng: np.random.Generator
) -> Pixels:
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter."""
    low = [max(0.0, 1 - strength[0]), max(0.0, 1 - strength[1]), max(0.0, 1 - strength[2])]
    factors = [*rng.uniform(low, [1 + s for s in strength[:3]]), rng.uniform(-1, 1) * strength[3]]
    image = Image.fromarray(view)
    for kind in rng.permutation(4).tolist():
        image = adjust_color(image, kind, float(factors[kind]))
    return np.asarray(image)


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


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """The part that `random_resized_crop` takes: left, top, right, bottom."""
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
