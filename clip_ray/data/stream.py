"""The training stream: each worker's own Ray Data graph, in the order of `order.py`.

A unit of work is the micro batches of one rank at a few steps. Units wait at the readers, a few at
each, so that no reader waits for the scheduler. One execution serves many epochs; a run of any
length is a chain of them, each begun before the one before it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from pydantic import TypeAdapter
from ray.data import ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from clip_ray.config import DataConfig
from clip_ray.data.images import decode_prepared
from clip_ray.data.order import Order
from clip_ray.data.reader import ShardReader, open_reader
from clip_ray.data.shards import Manifest, Shard
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.transforms import augment
from clip_ray.errors import RunError
from clip_ray.storage import Storage

Arrays = dict[str, NDArray[Any]]
# Half a CPU for each reader: they wait for S3 part of the time.
READER_CPUS = 0.5
# A unit costs Ray some 10 ms: it is large enough to make that little, and small enough that the
# batches of all readers come evenly.
UNIT_IMAGES = 128
# At each reader, two of them begun: one is handed on while the next is made.
UNITS_AT_READER = 4
UNITS_BEGUN = 2
# Of a worker's finished units in the object store, so that nothing spills. Beside them are those
# at the readers and three on their way to the worker.
STORE_BYTES = 256 * 2**20
SCHEDULER_PAUSE_S = 0.02
UNITS_PER_LINK = 2000
# Units before a link's end at which the next one starts its readers, which takes seconds.
UNITS_AHEAD = 40


@dataclass(frozen=True)
class StreamSpec:
    """All that a reader needs to know."""

    data_root: str
    shards_json: str
    order: Order
    world_size: int
    image_size: int
    data: DataConfig
    tokenizer_json: str
    context_length: int
    readers: int  # for each rank
    reader_labels: Mapping[str, str]  # of the nodes they run on
    steps_per_unit: int  # whose micro batches one task makes
    units_per_link: int = UNITS_PER_LINK

    @property
    def unit_bytes(self) -> int:
        """Size of a unit's images."""
        micro_batch = self.order.global_batch // self.world_size
        return self.steps_per_unit * micro_batch * self.image_size**2 * 3


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
    return StreamSpec(
        data_root=storage.root,
        shards_json=TypeAdapter(list[Shard]).dump_json(manifest.splits["train"]).decode(),
        order=order,
        world_size=world_size,
        image_size=image_size,
        data=data,
        tokenizer_json=tokenizer.json_text,
        context_length=tokenizer.context_length,
        readers=readers,
        reader_labels=reader_labels or {},
        steps_per_unit=max(1, UNIT_IMAGES // (order.global_batch // world_size)),
    )


def training_stream(spec: StreamSpec, rank: int, steps: range) -> Iterator[Arrays]:
    """The micro batches of `rank` at `steps`, in order, for as many epochs as they span.

    Needs a Ray session. The arrays are those of `load_unit`, read-only, for one step each. Raises
    RunError where the stream brings another step than the next one.
    """
    return checked_micro_batches(_chain(spec, rank, steps), rank, steps.start)


def _chain(spec: StreamSpec, rank: int, steps: range) -> Iterator[Arrays]:
    link_steps = spec.units_per_link * spec.steps_per_unit
    link = _Link(spec, rank, steps[:link_steps])
    while link is not None:
        following, rest = None, steps[link_steps:]
        for number, unit in enumerate(link):
            if rest and following is None and number + UNITS_AHEAD >= spec.units_per_link:
                following = _Link(spec, rank, rest[:link_steps])
            yield unit
        link, steps = following, rest


class _Link:
    """One execution over a range of steps, begun at once."""

    def __init__(self, spec: StreamSpec, rank: int, steps: range) -> None:
        firsts = steps[:: spec.steps_per_unit]
        blocks = [pa.table({"first_step": [first]}) for first in firsts]
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.custom_execution_callback_classes = [_Unhurried]
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources(
            object_store_memory=max(STORE_BYTES, 2 * spec.unit_bytes)
        )
        with ray.data.DataContext.current(context):
            units: Any = ray.data.from_blocks(blocks).map_batches(
                UnitLoader,
                fn_constructor_args=(spec, rank, steps.stop),
                batch_size=None,
                num_cpus=READER_CPUS,
                label_selector=dict(spec.reader_labels),
                compute=ray.data.ActorPoolStrategy(
                    size=min(spec.readers, len(blocks)),
                    max_tasks_in_flight_per_actor=UNITS_AT_READER,
                    max_concurrent_calls_per_actor=UNITS_BEGUN,
                ),
            )
        self._units = iter(
            units.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
        )
        starter = ThreadPoolExecutor(1, thread_name_prefix="next-link")
        self._first = starter.submit(next, self._units)
        starter.shutdown(wait=False)

    def __iter__(self) -> Iterator[Arrays]:
        yield self._first.result()
        yield from self._units


class _Unhurried(ExecutionCallback):
    """Lets Ray Data's scheduler take its time.

    It runs in a thread of the training worker. Where the readers are ahead and must wait, it would
    look for work without a pause, and take the interpreter from the training.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        time.sleep(SCHEDULER_PAUSE_S)


class UnitLoader:
    """A reader: the actor that makes units."""

    def __init__(self, spec: StreamSpec, rank: int, end_step: int) -> None:
        self._spec, self._rank, self._end_step = spec, rank, end_step

    def __call__(self, batch: Arrays) -> Arrays:
        """The unit that begins at the step in `batch`."""
        (first,) = batch["first_step"].tolist()
        last = min(first + self._spec.steps_per_unit, self._end_step)
        return load_unit(self._spec, self._rank, range(first, last))


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


def load_unit(spec: StreamSpec, rank: int, steps: range) -> Arrays:
    """Reads, decodes, crops and tokenises a unit: the micro batches of `rank` at `steps`.

    Returns images [B, H, W, 3] uint8, token_ids [B, k, L] int32, token_lengths [B, k] int32 of the
    k captions of each image, sample_ids [B] int64 and place [B, 2] int64 (step, rank), B over all
    steps of the unit.
    """
    _prefetch(spec, steps, rank)
    slices = [np.array_split(spec.order.sample_ids(step), spec.world_size)[rank] for step in steps]
    sample_ids = np.concatenate(slices)
    place = np.repeat([(step, rank) for step in steps], [len(part) for part in slices], axis=0)
    rows = _reader(spec).rows(sample_ids.tolist(), columns=("image", "captions"))
    images = np.empty((len(sample_ids), spec.image_size, spec.image_size, 3), dtype=np.uint8)
    texts = []
    for number, row in enumerate(rows):
        rng = spec.order.rng(int(place[number, 0]), int(sample_ids[number]))
        texts += _draw(row["captions"], spec.data.captions_per_image, rng)
        images[number] = augment(decode_prepared(row["image"]), spec.image_size, spec.data, rng)
    token_ids, token_lengths = _tokenizer(spec)(texts)
    captions = (len(sample_ids), spec.data.captions_per_image)
    return {
        "images": images,
        "token_ids": token_ids.reshape(*captions, -1),
        "token_lengths": token_lengths.reshape(captions),
        "sample_ids": sample_ids,
        "place": place,
    }


def _draw(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions, each once before any comes again."""
    if count == 1:
        return [captions[int(rng.integers(len(captions)))]]
    order: list[int] = rng.permutation(len(captions)).tolist()
    return [captions[order[number % len(order)]] for number in range(count)]


def _prefetch(spec: StreamSpec, steps: range, rank: int) -> None:
    """This rank's share of the blocks that come into use one window later."""
    reader, rows = _reader(spec), spec.order.block_rows
    for step in steps:
        starts = spec.order.blocks_ahead(step)[rank :: spec.world_size] * rows
        reader.prefetch(min(start, len(reader) - 1) for start in starts.tolist())


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
