"""Image bytes to upright RGB, with a defined result for every mode, or a reason why not."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg

Pixels = NDArray[np.uint8]
ORIENTATION = 0x0112  # of EXIF; 1 is upright
# Our own limit, with a reason, stands in for Pillow's warning.
Image.MAX_IMAGE_PIXELS = None


class BadImage(ValueError):
    """Bytes that cannot be used; `reason` is one of a few words, the message has the detail."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, str(detail)


def decode_rgb(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """`decode_pixels` for Pillow."""
    return Image.fromarray(decode_pixels(data, max_pixels))


def decode_pixels(data: bytes, max_pixels: int | None = None) -> Pixels:
    """The whole image, upright and RGB: [H, W, 3] uint8.

    The first frame of an animation; transparency over white; 16 bits cut to 8. Raises BadImage:
    `empty`, `not an image`, `too large`, `damaged`.
    """
    if not data:
        raise BadImage("empty", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadImage("not an image", str(error).split(" <")[0]) from None
    pixels = image.width * image.height
    if max_pixels is not None and pixels > max_pixels:
        raise BadImage("too large", f"{image.width}×{image.height}, above {max_pixels} pixels")
    try:
        return _pixels(image, data)
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        raise BadImage("damaged", f"{type(error).__name__}: {error}") from None


def decode_prepared(data: bytes | memoryview) -> Pixels:
    """An image of a train shard, which prepare has made an upright RGB JPEG: [H, W, 3] uint8."""
    return decode_jpeg(data, "RGB", strict=False)


def smaller_jpeg(data: bytes, pixels: Pixels, shorter_side: int | None, quality: int) -> bytes:
    """`pixels` (that `data` decodes to) with its shorter side at most `shorter_side`, as JPEG.

    An upright RGB JPEG that is small enough keeps its bytes.
    """
    sides = pixels.shape[:2]
    shrink = shorter_side is not None and min(sides) > shorter_side
    if not shrink and _is_plain_jpeg(data):
        return data
    if shrink and shorter_side is not None:
        # Here, so that only who shrinks an image waits for torch.
        from clip_ray.data.resize import resize

        scale = shorter_side / min(sides)
        height, width = (max(shorter_side, round(side * scale)) for side in sides)
        pixels = resize(pixels, height, width)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _is_plain_jpeg(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return _is_upright_jpeg(image)


def _is_upright_jpeg(image: Image.Image) -> bool:
    if image.format != "JPEG" or image.mode != "RGB":
        return False
    try:
        return image.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # a broken EXIF block tells no orientation
        return True


def _pixels(image: Image.Image, data: bytes) -> Pixels:
    if _is_upright_jpeg(image):
        # The same library without Pillow's own buffers; what it doubts, Pillow decides.
        with contextlib.suppress(ValueError):
            return decode_jpeg(data, "RGB", strict=True)
    return np.asarray(_rgb(_upright(image)))


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block tells no orientation; the pixels are whole
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_wide_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _from_wide_grey(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.float64)
    if grey.max(initial=0) > 255:
        grey = grey / 256
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
