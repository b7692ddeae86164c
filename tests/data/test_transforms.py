"""Crops have the asked-for shape and stay inside the image."""

import numpy as np
import pytest
from PIL import Image

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
