"""Crops have the asked-for shape and stay inside the image."""

import io
import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as torchvision_functional
from torchvision.transforms.v2 import functional as v2_functional
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_ray.config import DataConfig
from clip_ray.data.transforms import adjust_color, augment, center_crop, random_resized_crop

functional: Any = torchvision_functional  # its types know tensors only
SCENE = np.random.default_rng(1).integers(0, 256, (80, 90, 3), dtype=np.uint8)


def config_of(**fields: Any) -> DataConfig:
    return DataConfig(name="x", **fields)


@pytest.mark.parametrize(("width", "height"), [(501, 375), (333, 499), (64, 64)])
def test_crops_are_square_uint8(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), "red")
    rng = np.random.default_rng(0)
    for crop in (center_crop(image, 64), augment(np.asarray(image), 64, config_of(), rng)):
        assert crop.shape == (64, 64, 3)
        assert crop.dtype == np.uint8
        assert (crop == [255, 0, 0]).all()


def test_a_crop_is_cut_and_then_resized_as_torchvision_does() -> None:
    drawn = random_resized_crop(SCENE, 32, (0.3, 0.4), (1.0, 1.0), np.random.default_rng(2))
    boxes = itertools.product(range(90 - 45), range(80 - 45), range(46, 55))
    transform = partial(
        v2_functional.resized_crop, size=[32, 32], interpolation=InterpolationMode.BICUBIC
    )
    image = torch.from_numpy(SCENE).permute(2, 0, 1)
    found = [
        (left, top, side)
        for left, top, side in boxes
        if left + side <= 90 and top + side <= 80
        and np.array_equal(drawn, transform(image, top, left, side, side).permute(1, 2, 0))
    ]  # fmt: skip
    assert len(found) == 1


def test_the_same_random_state_gives_the_same_view() -> None:
    config = config_of(crop_scale=(0.3, 1.0), flip_prob=0.5, color_jitter_prob=0.8, grey_prob=0.2)
    views = [augment(SCENE, 32, config, np.random.default_rng(2)) for _ in range(2)]
    assert (views[0] == views[1]).all()


def test_flip_jitter_and_grey_come_with_their_probabilities() -> None:
    rng = np.random.default_rng(3)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    square = SCENE[:80, :80]
    plain = augment(square, 80, config_of(**whole), rng)
    assert np.array_equal(plain, square)
    flipped = augment(square, 80, config_of(**whole, flip_prob=1), rng)
    assert np.array_equal(flipped, square[:, ::-1])
    grey = augment(square, 80, config_of(**whole, grey_prob=1), rng)
    assert (np.ptp(grey, axis=2) == 0).all()
    jittered = [
        augment(square, 80, config_of(**whole, color_jitter_prob=0.5), rng) for _ in range(200)
    ]
    unchanged = sum(np.array_equal(view, square) for view in jittered)
    assert 70 < unchanged < 130


@pytest.mark.parametrize("factor", [0.68, 0.9, 1.0, 1.32])
def test_colours_change_as_in_torchvision(factor: float) -> None:
    image = Image.fromarray(SCENE)
    changes = (
        functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
    )  # fmt: skip
    for kind, change in enumerate(changes):
        assert np.array_equal(np.asarray(adjust_color(image, kind, factor)), change(image, factor))
    hue = factor - 1
    assert np.array_equal(
        np.asarray(adjust_color(image, 3, hue)), functional.adjust_hue(image, hue)
    )


@pytest.mark.parametrize(
    "size", [(501, 375), (499, 333), (500, 374), (640, 427), (375, 500), (224, 224)]
)
def test_center_crops_are_those_of_their_libraries_pixel_for_pixel(size: tuple[int, int]) -> None:
    scene = np.random.default_rng(5).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(scene).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    image = Image.open(buffer).convert("RGB")
    transform: Any = image_transform(224, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    theirs = transform(image)
    theirs = (theirs.permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(center_crop(image, 224, "open_clip"), theirs)
    processor: Any = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert np.array_equal(center_crop(image, 224, "hf"), theirs.transpose(1, 2, 0))
