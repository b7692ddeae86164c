"""The training stream: one Ray Data execution for the whole run, in the order of `order.py`.

A unit of work is the micro batches of one rank at a few steps. The unit's number says what to read,
so the stream can begin at any step; each sample carries its step and rank, which the worker checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray
from pydantic import TypeAdapter

from clip_ray.config import DataConfig
from clip_ray.data.images import decode_prepared
from clip_ray.data.order import Order
from clip_ray.data.reader import ShardReader, open_reader
from clip_ray.data.shards import Manifest, Shard
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.transforms import random_resized_crop
from clip_ray.errors import RunError
from clip_ray.storage import Storage

Arrays = dict[str, NDArray[Any]]
# Half a CPU for each reader task: they wait for S3 part of the time.
READER_CPUS = 0.5
# Ray starts the next task some 0.1 s after one ends: a unit is large enough to make that little.
UNIT_IMAGES = 256


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
    steps_per_unit: int  # whose micro batches one task makes


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
        shards_json=TypeAdapter(list[Shard]).dump_json(manifest.splits["train"]).decode(),
        order=order,
        world_size=world_size,
        image_size=image_size,
        data=data,
        tokenizer_json=tokenizer.json_text,
        context_length=tokenizer.context_length,
        steps_per_unit=max(1, UNIT_IMAGES // (order.global_batch // world_size)),
    )


def training_stream(spec: StreamSpec, start_step: int, end_step: int) -> ray.data.Dataset:
    """The units of steps [start_step, end_step), ordered by step, then rank.

    Split over `world_size` consumers with the order preserved, rank r gets its own units.
    """
    units = math.ceil((end_step - start_step) / spec.steps_per_unit) * spec.world_size
    load: Any = partial(_load_block, spec_ref=ray.put(spec), steps=(start_step, end_step))
    return ray.data.range(units, override_num_blocks=units).map_batches(
        load,
        batch_size=None,
        num_cpus=READER_CPUS,
    )


def checked_micro_batches(units: Iterator[Arrays], rank: int, start_step: int) -> Iterator[Arrays]:
    """The micro batches of one rank, each proved to be the next one. Raises RunError if not."""
    step = start_step
    for unit in units:
        place = unit.pop("place")
        # Where the step changes from one row to the next.
        ends = [*(np.flatnonzero(np.diff(place[:, 0])) + 1).tolist(), len(place)]
        start = 0
        for end in ends:
            found = set(map(tuple, place[start:end].tolist()))
            if found != {(step, rank)}:
                raise RunError(
                    f"rank {rank} expected step {step}, the stream brought {sorted(found)}"
                )
            yield {name: array[start:end] for name, array in unit.items()}
            start, step = end, step + 1


def _load_block(batch: Arrays, spec_ref: Any, steps: tuple[int, int]) -> Arrays:
    spec: Any = ray.get(spec_ref)
    (number,) = batch["id"].tolist()
    return load_unit(spec, number, *steps)


def load_unit(spec: StreamSpec, unit: int, start_step: int, end_step: int) -> Arrays:
    """Reads, decodes, crops and tokenises a unit: one rank's micro batches of its steps.

    Returns images [B, H, W, 3] uint8, token_ids [B, L] int32, token_lengths [B] int32,
    sample_ids [B] int64 and place [B, 2] int64 (step, rank), B over all steps of the unit.
    """
    number, rank = divmod(unit, spec.world_size)
    first = start_step + number * spec.steps_per_unit
    steps = range(first, min(first + spec.steps_per_unit, end_step))
    _prefetch(spec, steps, rank)
    micro_batches = [_load_micro_batch(spec, step, rank) for step in steps]
    return {
        name: np.concatenate([part[name] for part in micro_batches]) for name in micro_batches[0]
    }


def _prefetch(spec: StreamSpec, steps: range, rank: int) -> None:
    """This rank's share of the blocks that come into use one window later."""
    reader, rows = _reader(spec), spec.order.block_rows
    for step in steps:
        starts = spec.order.blocks_ahead(step)[rank :: spec.world_size] * rows
        reader.prefetch(min(start, len(reader) - 1) for start in starts.tolist())


def _load_micro_batch(spec: StreamSpec, step: int, rank: int) -> Arrays:
    reader, tokenizer = _reader(spec), _tokenizer(spec)
    mine = np.array_split(spec.order.sample_ids(step), spec.world_size)[rank]
    images, captions = [], []
    for sample_id, row in zip(mine, reader.rows(mine.tolist()), strict=True):
        rng = spec.order.rng(step, int(sample_id))
        captions.append(row["captions"][rng.integers(len(row["captions"]))])
        crop = (spec.data.crop_scale, spec.data.crop_ratio)
        image = decode_prepared(row["image"])
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
def _reader_of(data_root: str, shards_json: str, data_json: str) -> ShardReader:
    shards = TypeAdapter(list[Shard]).validate_json(shards_json)
    return open_reader(DataConfig.model_validate_json(data_json), Storage(data_root), shards)


def _reader(spec: StreamSpec) -> ShardReader:
    return _reader_of(spec.data_root, spec.shards_json, spec.data.model_dump_json())


_tokenizer_of: Callable[[str, int], CaptionTokenizer] = lru_cache(maxsize=1)(CaptionTokenizer)


def _tokenizer(spec: StreamSpec) -> CaptionTokenizer:
    return _tokenizer_of(spec.tokenizer_json, spec.context_length)
