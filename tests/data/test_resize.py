"""The resize of what is trained on: Pillow's, but for a rounding in a few pixels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from clip_ray.data.resize import resize

SCENE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8))
PHOTOGRAPH = np.asarray(SCENE.resize((501, 375), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("height", "width"), [(256, 342), (224, 224), (375, 501), (700, 333), (31, 7)]
)
def test_it_is_pillows_but_for_a_rounding_in_a_few_pixels(height: int, width: int) -> None:
    resized = resize(PHOTOGRAPH, height, width)
    pillows = Image.fromarray(PHOTOGRAPH).resize((width, height), Image.Resampling.BICUBIC)
    off = np.abs(resized - np.int16(np.asarray(pillows)))
    assert off.max() <= 2
    assert (off > 0).mean() < 0.01
    assert (off > 1).mean() < 1e-4
    assert resized.flags["C_CONTIGUOUS"]


def test_it_takes_parts_and_mirrored_and_read_only_images() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = resize(PHOTOGRAPH[10:200, 20:300], 64, 64)
        mirrored = resize(PHOTOGRAPH[10:200, 20:300][:, ::-1], 64, 64)
    assert not PHOTOGRAPH.flags["WRITEABLE"]
    assert np.abs(part - np.int16(mirrored[:, ::-1])).max() <= 2
