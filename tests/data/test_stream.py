"""Each rank gets exactly its own units, whatever the step it starts at; a wrong one is an error."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from clip_ray.config import Config
from clip_ray.data.order import Order
from clip_ray.data.prepare import prepare
from clip_ray.data.stream import checked_units, load_unit, stream_spec, training_stream
from clip_ray.data.tokenizer import make_tokenizer
from clip_ray.errors import RunError
from clip_ray.pipeline import session
from clip_ray.storage import Storage

WORLD_SIZE, START, END = 2, 3, 7


@pytest.mark.cluster
@pytest.mark.s3
def test_ranks_get_their_slices_of_the_global_batches(small_config: Config) -> None:
    with session(small_config, print):
        spec = spec_of(small_config)
        data = training_stream(spec, START, END)
        data.context.execution_options.preserve_order = True
        shards = data.streaming_split(WORLD_SIZE, equal=True)
        found = ray.get([consume.remote(shard) for shard in shards])
    for rank, units in enumerate(found):
        assert len(units) == END - START
        for step, unit in zip(range(START, END), units, strict=True):
            wanted = load_unit(spec, step * WORLD_SIZE + rank)
            assert (unit["place"] == [step, rank]).all()
            for name, array in wanted.items():
                assert np.array_equal(unit[name], array), name
    for step in range(END - START):
        ids = np.concatenate([units[step]["sample_ids"] for units in found])
        assert np.array_equal(ids, spec.order.sample_ids(START + step))


@ray.remote(num_cpus=0)
def consume(shard):
    return list(shard.iter_batches(batch_size=None, batch_format="numpy"))


def spec_of(config: Config):
    storage = Storage(config.data_root)
    manifest = prepare(config.data, storage, print)
    return stream_spec(
        data=config.data,
        storage=storage,
        manifest=manifest,
        tokenizer=make_tokenizer(config.model.text, ["a large red star at the top left"]),
        order=Order(config.seed, manifest.rows("train"), config.train.global_batch),
        world_size=WORLD_SIZE,
        image_size=config.model.image.size,
    )


def test_a_unit_in_the_wrong_place_is_an_error() -> None:
    units = iter([{"place": np.array([[4, 0], [4, 0]])}, {"place": np.array([[6, 0]])}])
    checked = checked_units(units, rank=0, start_step=4)
    assert next(checked) == {}
    with pytest.raises(RunError, match=r"rank 0 expected step 5, the stream brought \[\(6, 0\)\]"):
        next(checked)
