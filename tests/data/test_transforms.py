"""Crops have the asked-for shape and stay inside the image."""

import io
from typing import Any

import numpy as np
import pytest
from open_clip.transform import image_transform
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_ray.data.transforms import center_crop, random_resized_crop


@pytest.mark.parametrize(("width", "height"), [(501, 375), (333, 499), (64, 64)])
def test_crops_are_square_uint8(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), "red")
    rng = np.random.default_rng(0)
    for crop in (
        center_crop(image, 64),
        random_resized_crop(image, 64, (0.5, 1.0), (0.75, 4 / 3), rng),
    ):
        assert crop.shape == (64, 64, 3)
        assert crop.dtype == np.uint8
        assert (crop == [255, 0, 0]).all()


def test_the_same_random_state_gives_the_same_crop() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 90, 3), dtype=np.uint8))
    crops = [
        random_resized_crop(image, 32, (0.3, 1.0), (0.75, 4 / 3), np.random.default_rng(2))
        for _ in range(2)
    ]
    assert (crops[0] == crops[1]).all()


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
