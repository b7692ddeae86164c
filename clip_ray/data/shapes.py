"""The embedded data set **shapes**: drawn scenes in Flickr30k's own raw layout.

A scene is two or three objects, each of 8 shapes, 8 colours, 9 places and 2 sizes, on a textured
background. No scene comes twice, so the splits share captions' words but no scene. Zero-shot
classification has scenes of a single object, one class for each colour and shape ("red star").
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_ray.data.layouts import KARPATHY_FILE, TOKEN_FILES

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "bar")
COLOURS = {
    "red": (214, 40, 40), "orange": (240, 140, 30), "yellow": (240, 220, 60),
    "green": (50, 160, 70), "cyan": (60, 200, 210), "blue": (45, 80, 200),
    "purple": (140, 60, 170), "white": (240, 240, 240),
}  # fmt: skip
PLACES = (
    "top left", "top", "top right", "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
SIZES = {"small": 0.27, "large": 0.45}  # radius, as a share of a place's width
IMAGE_FOLDER = "flickr30k-images"
CAPTIONS_PER_IMAGE = 5
_PIXELS = 72
_OVERSAMPLING = 3
_BIG = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_AT = ("at the {}", "in the {}", "on the {}")


@dataclass(frozen=True, order=True)
class Thing:
    """An object of a scene, by the index of each attribute."""

    place: int
    shape: str
    colour: str
    size: str


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class ShapesSpec:
    """How many images of each kind, and the seed of everything drawn."""

    train: int = 4000
    val: int = 200
    test: int = 500
    zero_shot_per_class: int = 4
    seed: int = 0


def write_shapes(folder: Path, spec: ShapesSpec | None = None) -> bool:
    """Writes the data set to `folder`, annotations last; False if it is there already.

    The same spec gives the same files, byte for byte.
    """
    spec = spec or ShapesSpec()
    marker, wanted = folder / "shapes.json", json.dumps(asdict(spec))
    if marker.exists() and marker.read_text() == wanted:
        return False
    images = folder / IMAGE_FOLDER
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(spec.seed)
    splits = ["train"] * spec.train + ["val"] * spec.val + ["test"] * spec.test
    rng.shuffle(splits)
    lines, entries = [], []
    numbers = np.sort(rng.choice(9 * 10**9, len(splits), replace=False) + 10**9)
    for imgid, (scene, split, number) in enumerate(
        zip(_distinct_scenes(len(splits), rng), splits, numbers, strict=True)
    ):
        filename = f"{number}.jpg"
        (images / filename).write_bytes(draw(scene, rng))
        captions = describe(scene, rng)
        lines += [f"{filename}#{i}\t{caption}\n" for i, caption in enumerate(captions)]
        entries.append(_karpathy_entry(imgid, filename, split, captions))
    _write_zero_shot(folder / "zero-shot", spec.zero_shot_per_class, rng)
    (folder / TOKEN_FILES[0]).write_text("".join(lines), encoding="utf-8")
    karpathy = {"images": entries, "dataset": "flickr30k"}
    (folder / KARPATHY_FILE).write_text(json.dumps(karpathy), encoding="utf-8")
    marker.write_text(wanted)
    return True


def draw(scene: Scene, rng: np.random.Generator) -> bytes:
    """The scene as a textured JPEG."""
    side = _PIXELS * _OVERSAMPLING
    image = Image.fromarray(_background(rng)).resize((side, side), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(image)
    cell = side / 3
    for thing in scene:
        row, column = divmod(thing.place, 3)
        shift_x, shift_y = rng.uniform(-0.05, 0.05, 2) * cell
        radius = SIZES[thing.size] * cell * rng.uniform(0.92, 1.08)
        centre = (column + 0.5) * cell + shift_x, (row + 0.5) * cell + shift_y
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3), 0, 255)
        _draw_thing(canvas, thing.shape, centre, radius, tuple(map(int, colour)))
    small = image.resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
    grain = rng.normal(0, 5, (_PIXELS, _PIXELS, 1))
    pixels = np.clip(np.asarray(small) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def describe(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five differently worded captions of the scene, each naming every object."""
    captions: list[str] = []
    while len(captions) < CAPTIONS_PER_IMAGE:
        wording = len(captions)
        things = [scene[i] for i in rng.permutation(len(scene))]
        phrases = [_phrase(thing, wording, rng) for thing in things]
        joined = ", ".join(phrases[:-1]) + " and " + phrases[-1] if phrases[1:] else phrases[0]
        opening = ("{}.", "There is {}.", "{} on a grey ground.", "A picture of {}.", "We see {}.")
        caption = opening[wording].format(joined)
        captions.append(caption[0].upper() + caption[1:])
    return captions


def _phrase(thing: Thing, wording: int, rng: np.random.Generator) -> str:
    size = _BIG[thing.size][rng.integers(3)]
    at = _AT[rng.integers(3)].format(PLACES[thing.place])
    if wording == 1:
        return f"a {thing.colour} {thing.shape} {at} that is {size}"
    if wording == 4:
        return f"{at} a {size} {thing.shape} in {thing.colour}"
    return f"a {size} {thing.colour} {thing.shape} {at}"


def _distinct_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        places = rng.choice(len(PLACES), int(rng.integers(2, 4)), replace=False)
        scenes[tuple(sorted(_thing(int(place), rng) for place in places))] = None
    return list(scenes)


def _thing(place: int, rng: np.random.Generator) -> Thing:
    return Thing(
        place,
        SHAPES[rng.integers(len(SHAPES))],
        list(COLOURS)[rng.integers(len(COLOURS))],
        list(SIZES)[rng.integers(len(SIZES))],
    )


def _write_zero_shot(folder: Path, per_class: int, rng: np.random.Generator) -> None:
    for colour in COLOURS:
        for shape in SHAPES:
            class_folder = folder / f"{colour} {shape}"
            class_folder.mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                thing = _thing(int(rng.integers(len(PLACES))), rng)
                scene = (Thing(thing.place, shape, colour, thing.size),)
                (class_folder / f"{number}.jpg").write_bytes(draw(scene, rng))


def _karpathy_entry(
    imgid: int, filename: str, split: str, captions: Sequence[str]
) -> dict[str, object]:
    first = imgid * CAPTIONS_PER_IMAGE
    sentences = [
        {"raw": caption, "tokens": caption.lower().rstrip(".").replace(",", "").split(),
         "sentid": first + i, "imgid": imgid}
        for i, caption in enumerate(captions)
    ]  # fmt: skip
    sentids = [first + i for i in range(len(captions))]
    return {
        "filename": filename, "imgid": imgid, "split": split,
        "sentids": sentids, "sentences": sentences,
    }  # fmt: skip


def _background(rng: np.random.Generator) -> np.ndarray:
    """A coarse grey texture with a gradient: [9, 9, 3] uint8."""
    base = rng.uniform(60, 120)
    gradient = np.linspace(-15, 15, 9) * rng.choice([-1, 1])
    texture = base + gradient[:, None] + rng.normal(0, 7, (9, 9))
    return np.clip(texture[..., None] + rng.normal(0, 3, 3), 0, 255).astype(np.uint8)


def _draw_thing(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    colour: tuple[int, ...],
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=max(2, int(radius * 0.42)))
    elif shape == "bar":
        canvas.rectangle((x - radius, y - radius * 0.4, x + radius, y + radius * 0.4), fill=colour)
    elif shape == "cross":
        arm = radius * 0.36
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        canvas.polygon(_corners(shape, x, y, radius), fill=colour)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "square":
        edge = radius * 0.88
        return [
            (x - edge, y - edge),
            (x + edge, y - edge),
            (x + edge, y + edge),
            (x - edge, y + edge),
        ]
    points, inner = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (10, 0.42)}[shape]
    angles = -np.pi / 2 + 2 * np.pi * np.arange(points) / points
    radii = [radius * (inner if i % 2 and shape == "star" else 1.0) for i in range(points)]
    return [(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
