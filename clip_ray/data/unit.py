"""A unit of the stream's work: one rank's samples of a few steps, or of a part of one."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_ray.config import DataConfig
from clip_ray.data.images import decode_prepared
from clip_ray.data.order import Order
from clip_ray.data.reader import open_reader
from clip_ray.data.shards import Manifest, Shard
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.transforms import augment
from clip_ray.storage import Storage

Arrays = dict[str, NDArray[Any]]
# A unit costs Ray some 10 ms: it is large enough to make that little, and small enough that the
# batches of all readers come evenly, and that a few of each reader fit in the object store. A micro
# batch of more is made in parts.
UNIT_IMAGES = 128
UNIT_BYTES = 20 * 2**20
UNITS_PER_LINK = 2000


@dataclass(frozen=True)
class StreamSpec:
    """All that a reader needs to know."""

    data_root: str
    shards: Sequence[Shard]
    order: Order
    world_size: int
    image_size: int
    data: DataConfig
    tokenizer_json: str
    context_length: int
    readers: int  # for each rank
    reader_labels: Mapping[str, str]  # of the nodes they run on
    steps_per_unit: int  # whose micro batches one task makes
    units_per_step: int = 1  # tasks that make one micro batch; more than one where it is large
    units_per_link: int = UNITS_PER_LINK

    @property
    def local_batch(self) -> int:
        """Images of a rank in a step."""
        return self.order.global_batch // self.world_size

    @property
    def unit_bytes(self) -> int:
        """Size of a unit's images."""
        images = self.steps_per_unit * self.local_batch // self.units_per_step
        return images * self.image_size**2 * 3


def stream_spec(
    *,
    data: DataConfig,
    storage: Storage,
    manifest: Manifest,
    tokenizer: CaptionTokenizer,
    order: Order,
    world_size: int,
    readers: int,
    image_size: int,
    reader_labels: Mapping[str, str] | None = None,
) -> StreamSpec:
    """Gathers what the readers need."""
    local_batch = order.global_batch // world_size
    images_per_unit = max(1, min(UNIT_IMAGES, UNIT_BYTES // (image_size**2 * 3)))
    return StreamSpec(
        data_root=storage.root,
        shards=manifest.splits["train"],
        order=order,
        world_size=world_size,
        image_size=image_size,
        data=data,
        tokenizer_json=tokenizer.json_text,
        context_length=tokenizer.context_length,
        readers=readers,
        reader_labels=reader_labels or {},
        steps_per_unit=max(1, images_per_unit // local_batch),
        units_per_step=math.ceil(local_batch / images_per_unit),
    )


class UnitMaker:
    """Reads, decodes, crops and tokenises; several threads may ask it at once."""

    def __init__(self, spec: StreamSpec) -> None:
        self._spec = spec
        self._reader = open_reader(spec.data, Storage(spec.data_root), spec.shards)
        self._tokenizer = CaptionTokenizer(spec.tokenizer_json, spec.context_length)
        # Two units begun are ready one by one, and do not wait for each other's interpreter.
        self._decoding = threading.Lock()

    def make(self, rank: int, steps: range, part: int = 0) -> Arrays:
        """A unit: a part, of `spec.units_per_step`, of the micro batches of `rank` at `steps`.

        Returns images [B, H, W, 3] uint8, token_ids [B, k, L] int32, token_lengths [B, k] int32 of
        the k captions of each image, sample_ids [B] int64 and place [B, 2] int64 (step, rank), B
        over all steps of the unit. Raises RunError where storage does not give a shard.
        """
        self._prefetch(steps, rank, part)
        spec = self._spec
        slices = [np.array_split(spec.order.sample_ids(s), spec.world_size)[rank] for s in steps]
        place = np.repeat([(step, rank) for step in steps], [len(s) for s in slices], axis=0)
        sample_ids = np.array_split(np.concatenate(slices), spec.units_per_step)[part]
        place = np.array_split(place, spec.units_per_step)[part]
        rows = list(self._reader.rows(sample_ids.tolist(), columns=("image", "captions")))
        with self._decoding:
            images, texts = self._views(rows, place[:, 0].tolist(), sample_ids.tolist())
        token_ids, token_lengths = self._tokenizer(texts)
        captions = (len(sample_ids), spec.data.captions_per_image)
        return {
            "images": images,
            "token_ids": token_ids.reshape(*captions, -1),
            "token_lengths": token_lengths.reshape(captions),
            "sample_ids": sample_ids,
            "place": place,
        }

    def _views(
        self, rows: Sequence[Mapping[str, Any]], steps: Sequence[int], sample_ids: Sequence[int]
    ) -> tuple[NDArray[np.uint8], list[str]]:
        """The crops and captions of samples at their steps."""
        spec = self._spec
        images = np.empty((len(rows), spec.image_size, spec.image_size, 3), dtype=np.uint8)
        texts: list[str] = []
        for number, (row, step, sample_id) in enumerate(zip(rows, steps, sample_ids, strict=True)):
            rng = spec.order.rng(step, sample_id)
            texts += _draw(row["captions"], spec.data.captions_per_image, rng)
            images[number] = augment(decode_prepared(row["image"]), spec.image_size, spec.data, rng)
        return images, texts

    def _prefetch(self, steps: range, rank: int, part: int) -> None:
        """This unit's share of the blocks that come into use one window later."""
        spec, rows, last = self._spec, self._spec.order.block_rows, len(self._reader) - 1
        for step in steps:
            of_rank = spec.order.blocks_ahead(step)[rank :: spec.world_size]
            starts = of_rank[part :: spec.units_per_step] * rows
            self._reader.prefetch(min(start, last) for start in starts.tolist())


def _draw(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions, each once before any comes again."""
    if count == 1:
        return [captions[int(rng.integers(len(captions)))]]
    order: list[int] = rng.permutation(len(captions)).tolist()
    return [captions[order[number % len(order)]] for number in range(count)]
