"""A stream that is not taken stands still: Ray's object store never spills to disk."""

from __future__ import annotations

import time

import pytest
import ray
from ray._private.internal_api import memory_summary
from test_stream import spec_of

from clip_ray.config import Config
from clip_ray.data.prepare import prepare
from clip_ray.data.stream import training_stream
from clip_ray.storage import Storage


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.parametrize(
    ("image_size", "global_batch", "readers"),
    [(224, 24, 1), (640, 128, 8)],
    ids=["small batches", "large batches and many readers"],
)
def test_a_slow_consumer_makes_nothing_spill(
    small_config: Config, image_size: int, global_batch: int, readers: int
) -> None:
    """Twice the object store's size goes through it, much slower than the readers could."""
    store_bytes = 2**30 if readers > 1 else 2**29
    ray.init("local", num_cpus=4, object_store_memory=store_bytes, include_dashboard=False)
    try:
        manifest = prepare(small_config.data, Storage(small_config.data_root), print)
        spec = spec_of(small_config, manifest, 1, readers, image_size, global_batch)
        steps = 2 * store_bytes // (global_batch * image_size**2 * 3)
        for micro_batch in training_stream(spec, 0, range(steps)):
            assert len(micro_batch["images"]) == global_batch
            time.sleep(0.03)
        address = ray.get_runtime_context().gcs_address
        assert "Spilled" not in memory_summary(address, stats_only=True)
    finally:
        ray.shutdown()
