"""The training stream: one Ray Data execution for the whole run, in the order of `order.py`.

A unit of work is the micro batch of one rank at one step. The unit's number says what to read, so
the stream can begin at any step, and each unit carries its step and rank for the worker to check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from clip_ray.config import DataConfig
from clip_ray.data.images import decode_rgb
from clip_ray.data.order import Order
from clip_ray.data.shards import Manifest, ShardReader
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.transforms import random_resized_crop
from clip_ray.errors import RunError
from clip_ray.storage import Storage

Arrays = dict[str, NDArray[Any]]
# Half a CPU for each reader task: they wait for S3 part of the time.
READER_CPUS = 0.5


@dataclass(frozen=True)
class StreamSpec:
    """All that a reader task needs to know; small, since it travels with each task."""

    data_root: str
    shards_json: str
    order: Order
    world_size: int
    image_size: int
    data: DataConfig
    tokenizer_json: str
    context_length: int


def stream_spec(
    *,
    data: DataConfig,
    storage: Storage,
    manifest: Manifest,
    tokenizer: CaptionTokenizer,
    order: Order,
    world_size: int,
    image_size: int,
) -> StreamSpec:
    """Gathers what the reader tasks need."""
    return StreamSpec(
        data_root=storage.root,
        shards_json=manifest.model_dump_json(include={"splits"}),
        order=order,
        world_size=world_size,
        image_size=image_size,
        data=data,
        tokenizer_json=tokenizer.json_text,
        context_length=tokenizer.context_length,
    )


def training_stream(spec: StreamSpec, start_step: int, end_step: int) -> ray.data.Dataset:
    """The units of steps [start_step, end_step), ordered by step, then rank.

    Split over `world_size` consumers with the order preserved, rank r gets its own units.
    """
    units = (end_step - start_step) * spec.world_size
    first = start_step * spec.world_size
    load: Any = partial(_load_units, spec_ref=ray.put(spec), first=first)
    return ray.data.range(units, override_num_blocks=units).map_batches(
        load,
        batch_size=None,
        num_cpus=READER_CPUS,
    )


def checked_units(batches: Iterator[Arrays], rank: int, start_step: int) -> Iterator[Arrays]:
    """The units of one rank, each proved to be the next one. Raises RunError if one is not."""
    for step, unit in enumerate(batches, start_step):
        place = unit.pop("place")
        found = set(map(tuple, place.tolist()))
        if found != {(step, rank)}:
            raise RunError(f"rank {rank} expected step {step}, the stream brought {sorted(found)}")
        yield unit


def _load_units(batch: Arrays, spec_ref: Any, first: int) -> Arrays:
    spec: Any = ray.get(spec_ref)
    units = [load_unit(spec, first + int(number)) for number in batch["id"]]
    return {key: np.concatenate([unit[key] for unit in units]) for key in units[0]}


def load_unit(spec: StreamSpec, unit: int) -> Arrays:
    """Reads, decodes, crops and tokenises one rank's micro batch.

    Returns images [B, H, W, 3] uint8, token_ids [B, L] int32, token_lengths [B] int32,
    sample_ids [B] int64 and place [B, 2] int64 (step, rank).
    """
    step, rank = divmod(unit, spec.world_size)
    reader, tokenizer = _reader(spec), _tokenizer(spec)
    mine = np.array_split(spec.order.sample_ids(step), spec.world_size)[rank]
    images, captions = [], []
    for sample_id, row in zip(mine, reader.rows(mine.tolist()), strict=True):
        rng = spec.order.rng(step, int(sample_id))
        captions.append(row["captions"][rng.integers(len(row["captions"]))])
        image = decode_rgb(row["image"])
        crop = (spec.data.crop_scale, spec.data.crop_ratio)
        images.append(random_resized_crop(image, spec.image_size, *crop, rng))
    token_ids, token_lengths = tokenizer(captions)
    return {
        "images": np.stack(images),
        "token_ids": token_ids,
        "token_lengths": token_lengths,
        "sample_ids": mine,
        "place": np.tile(np.array([[step, rank]], dtype=np.int64), (len(mine), 1)),
    }


# A reader process serves many units: what it opened once, it keeps.
@lru_cache(maxsize=1)
def _reader_of(data_root: str, shards_json: str, cache_bytes: int) -> ShardReader:
    from pydantic import TypeAdapter

    from clip_ray.data.shards import Shard

    splits = TypeAdapter(dict[str, dict[str, list[Shard]]]).validate_json(shards_json)["splits"]
    return ShardReader(Storage(data_root), splits["train"], cache_bytes)


def _reader(spec: StreamSpec) -> ShardReader:
    cache_bytes = int(spec.data.read_cache_mib * 2**20)
    return _reader_of(spec.data_root, spec.shards_json, cache_bytes)


_tokenizer_of: Callable[[str, int], CaptionTokenizer] = lru_cache(maxsize=1)(CaptionTokenizer)


def _tokenizer(spec: StreamSpec) -> CaptionTokenizer:
    return _tokenizer_of(spec.tokenizer_json, spec.context_length)
