"""Every kind of image has one defined result; what is none has a reason."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_ray.data.images import (
    BadImage,
    decode_pixels,
    decode_prepared,
    decode_rgb,
    smaller_jpeg,
)

RED = (200, 30, 30)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes) -> tuple[int, ...]:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


def test_modes() -> None:
    red = Image.new("RGB", (8, 6), RED)
    assert pixel(encoded(red, "PNG")) == RED
    assert pixel(encoded(red.quantize(4), "PNG")) == RED
    assert pixel(encoded(Image.new("L", (8, 6), 77), "PNG")) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (8, 6), 1), "PNG")) == (255, 255, 255)
    assert pixel(encoded(red.convert("CMYK"), "TIFF")) == pytest.approx(RED, abs=2)


def test_transparency_lies_over_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (8, 6), (0, 0, 0, 0)), "PNG")) == (255, 255, 255)
    half = pixel(encoded(Image.new("RGBA", (8, 6), (0, 0, 0, 128)), "PNG"))
    assert half == pytest.approx((127, 127, 127), abs=1)
    assert pixel(encoded(Image.new("LA", (8, 6), (0, 0)), "PNG")) == (255, 255, 255)
    palette = Image.new("P", (8, 6), 0)
    assert pixel(encoded(palette, "PNG", transparency=0)) == (255, 255, 255)


def test_sixteen_bits_are_cut_to_eight() -> None:
    wide = Image.fromarray(np.full((6, 8), 0x80FF, dtype=np.uint16))
    assert pixel(encoded(wide, "PNG")) == (0x80, 0x80, 0x80)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(data) == (255, 0, 0)


def test_exif_turns_the_image_upright_and_train_bytes_need_it_no_more() -> None:
    image = Image.fromarray(np.zeros((6, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    data = encoded(image, "JPEG", exif=exif)
    assert decode_rgb(data).size == (6, 8)
    again = smaller_jpeg(data, decode_pixels(data), shorter_side=None, quality=95)
    assert decode_prepared(again).shape == (8, 6, 3)
    plain = encoded(image, "JPEG")
    assert smaller_jpeg(plain, decode_pixels(plain), shorter_side=6, quality=95) is plain


def test_the_fast_decoder_gives_pillows_pixels() -> None:
    scene = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(scene).resize((501, 375), Image.Resampling.BICUBIC)
    data = encoded(image, "JPEG", quality=92)
    assert np.array_equal(decode_prepared(data), np.asarray(decode_rgb(data)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>", "not an image"),
        (encoded(Image.new("L", (60, 60)), "PNG")[:-30], "damaged"),
        (encoded(Image.new("L", (2000, 600)), "PNG"), "too large"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode_rgb(data, max_pixels=10**6)
    assert caught.value.reason == reason
