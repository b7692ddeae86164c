"""Every rank gets its own samples at any world size, whatever the timing, from any step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from conftest import make_small_config, make_storage

from clip_ray.config import Config
from clip_ray.data.order import Order
from clip_ray.data.prepare import prepare
from clip_ray.data.shards import Manifest
from clip_ray.data.stream import checked_micro_batches, training_stream
from clip_ray.data.tokenizer import make_tokenizer
from clip_ray.data.unit import StreamSpec, UnitMaker, stream_spec
from clip_ray.errors import RunError
from clip_ray.pipeline import session
from clip_ray.storage import Storage

START, END = 3, 14
Prepared = tuple[Config, Manifest]


@pytest.fixture(scope="module")
def prepared(
    s3_environment: None, raw_shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prepared]:
    """A config and its prepared data, in a session of Ray for all tests here."""
    config = make_small_config(make_storage("stream"), raw_shapes, tmp_path_factory.mktemp("ray"))
    with session(config, print):
        yield config, prepare(config.data, Storage(config.data_root), print)


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(400)
def test_the_order_arrives_at_every_world_size_and_timing(prepared: Prepared) -> None:
    """From one reader for each worker, from two, and from three."""
    seen = []
    for world_size, readers in ((1, 3), (2, 2), (3, 1), (4, 1)):
        spec = spec_of(*prepared, world_size, readers)
        seen.append(stream_ids(spec))
    wanted = [spec.order.sample_ids(step).tolist() for step in range(START, END)]
    assert all(ids == wanted for ids in seen)


def stream_ids(spec: StreamSpec) -> list[list[int]]:
    """The sample ids of each step, the ranks' slices together, consumers slow at random."""
    parts = ray.get([consume.remote(spec, rank) for rank in range(spec.world_size)])
    return [list(itertools.chain(*slices)) for slices in zip(*parts, strict=True)]


@pytest.mark.cluster
@pytest.mark.s3
def test_a_run_is_a_chain_of_executions(prepared: Prepared) -> None:
    spec = spec_of(*prepared, 2)
    spec = dataclasses.replace(spec, steps_per_unit=2, units_per_link=2)
    ids = stream_ids(spec)
    assert ids == [spec.order.sample_ids(step).tolist() for step in range(START, END)]


@pytest.mark.cluster
@pytest.mark.s3
def test_a_large_micro_batch_is_made_in_parts(prepared: Prepared) -> None:
    """Of 12 images in 5 units, which do not divide it, in links of six steps."""
    whole = dataclasses.replace(spec_of(*prepared, 2, readers=3), steps_per_unit=1)
    parts = dataclasses.replace(whole, units_per_step=5, units_per_link=31)
    ids = stream_ids(parts)
    (joined,) = training_stream(parts, 1, range(4, 5))
    made_at_once = UnitMaker(whole).make(1, range(4, 5))
    assert ids == [whole.order.sample_ids(step).tolist() for step in range(START, END)]
    assert all(np.array_equal(joined[name], made_at_once[name]) for name in joined)


@pytest.mark.cluster
@pytest.mark.s3
def test_killed_readers_change_nothing(prepared: Prepared) -> None:
    spec = dataclasses.replace(spec_of(*prepared, 2), steps_per_unit=1)
    ended = threading.Event()
    killed: list[int] = []
    killer = threading.Thread(target=kill_readers, args=(ended, killed))
    killer.start()
    ids = stream_ids(spec)
    ended.set()
    killer.join()
    assert killed
    assert ids == [spec.order.sample_ids(step).tolist() for step in range(START, END)]


def kill_readers(ended: threading.Event, killed: list[int]) -> None:
    """Kills up to three processes that are at work on a unit."""
    while not ended.wait(0.02) and len(killed) < 3:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "MapBatches" in process.name() + " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    time.sleep(1)
                    break


@ray.remote(num_cpus=0)
def consume(spec: StreamSpec, rank: int) -> list[list[int]]:
    delays = random.Random(rank)
    ids = []
    for micro_batch in training_stream(spec, rank, range(START, END)):
        time.sleep(delays.uniform(0, 0.1 * (1 + rank)))
        ids.append(micro_batch["sample_ids"].tolist())
    return ids


def spec_of(
    config: Config,
    manifest: Manifest,
    world_size: int,
    readers: int = 1,
    image_size: int = 64,
    global_batch: int = 24,
) -> StreamSpec:
    return stream_spec(
        data=config.data,
        storage=Storage(config.data_root),
        manifest=manifest,
        tokenizer=make_tokenizer(config.model.text, ["a large red star at the top left"]),
        order=Order(
            config.seed, manifest.rows("train"), global_batch, block_rows=8, window_blocks=8
        ),
        world_size=world_size,
        readers=readers,
        image_size=image_size,
    )


@pytest.mark.cluster
@pytest.mark.s3
def test_a_sample_is_the_same_at_every_world_size_and_from_two_threads_at_once(
    prepared: Prepared,
) -> None:
    by_id = {}
    for world_size in (1, 3):
        spec = spec_of(*prepared, world_size)
        make = partial(UnitMaker(spec).make, steps=range(START, START + 1))
        with ThreadPoolExecutor(2) as threads:
            units = list(threads.map(make, range(world_size)))
        for unit in units:
            for row, sample_id in enumerate(unit["sample_ids"].tolist()):
                sample = {name: unit[name][row] for name in ("images", "token_ids")}
                before = by_id.setdefault(sample_id, sample)
                assert all(np.array_equal(before[name], sample[name]) for name in sample)
    assert len(by_id) == 24


def test_a_micro_batch_in_the_wrong_place_is_an_error() -> None:
    places = [np.array([[4, 0], [4, 0], [5, 0], [5, 0]]), np.array([[7, 0]])]
    units = ({"place": place} for place in places)
    checked = checked_micro_batches(units, rank=0, start_step=4, local_batch=2)
    assert [next(checked), next(checked)] == [{}, {}]
    with pytest.raises(RunError, match=r"rank 0 expected step 6, the stream brought \[\(7, 0\)\]"):
        next(checked)
