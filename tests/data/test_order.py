"""The order is a function: a permutation for every epoch, of any size, from any step."""

import time
import tracemalloc

import numpy as np
import pytest

from clip_ray.data.order import Order, permute, unpermute


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097])
def test_permute_is_a_permutation_and_unpermute_its_inverse(size: int) -> None:
    positions = np.arange(size, dtype=np.uint64)
    values = permute(positions, size, key=7)
    assert sorted(values) == list(range(size))
    for position in {0, size // 2, size - 1}:
        assert unpermute(int(values[position]), size, key=7) == position


@pytest.mark.parametrize("num_samples", [1, 5, 16, 17, 103, 640, 1000, 1037])
@pytest.mark.parametrize(("block_rows", "window_blocks"), [(1, 1), (4, 3), (16, 8), (7, 1000)])
def test_every_sample_comes_once_an_epoch(
    num_samples: int, block_rows: int, window_blocks: int
) -> None:
    order = Order(3, num_samples, 1, block_rows, window_blocks)
    for epoch in range(3):
        first = epoch * num_samples
        ids = [int(order.sample_ids(first + step)[0]) for step in range(num_samples)]
        assert sorted(ids) == list(range(num_samples))


def test_batches_of_an_epoch_are_disjoint_and_epochs_differ() -> None:
    order = Order(seed=3, num_samples=103, global_batch=10, block_rows=4, window_blocks=5)
    epochs = [
        np.concatenate([order.sample_ids(epoch * 10 + step) for step in range(10)])
        for epoch in range(2)
    ]
    assert all(len(set(ids.tolist())) == 100 for ids in epochs)
    assert (epochs[0] != epochs[1]).any()
    assert set(epochs[0].tolist()) != set(epochs[1].tolist())  # another tail is left out


def test_any_step_of_400_million_samples_is_reached_at_once() -> None:
    order = Order(seed=0, num_samples=400_000_000, global_batch=8_192)
    step = order.steps_per_epoch * 5 + 3_456
    times_s = []
    for offset in range(5):
        started = time.perf_counter()
        order.sample_ids(step + offset)
        times_s.append(time.perf_counter() - started)
    tracemalloc.start()
    ids = order.sample_ids(step)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 8_192
    assert ids.max() < 400_000_000
    assert np.median(times_s) < 0.05
    assert peak_bytes < 50e6


def test_blocks_ahead_are_each_named_once_and_one_window_before_their_use() -> None:
    order = Order(seed=1, num_samples=960, global_batch=24, block_rows=8, window_blocks=30)
    ahead: dict[int, int] = {}
    for step in range(order.steps_per_epoch):
        for block in order.blocks_ahead(step).tolist():
            if step < order.steps_per_epoch - order.window_blocks * 8 // 24:
                assert block not in ahead
                ahead[block] = step
    for step in range(order.steps_per_epoch):
        for sample_id in order.sample_ids(step).tolist():
            if sample_id // 8 in ahead:
                assert ahead[sample_id // 8] < step


def test_mixing_is_that_of_a_full_shuffle_but_for_neighbours() -> None:
    """How often two samples meet in a batch, over epochs, by how far they are apart."""
    order = Order(seed=2, num_samples=4096, global_batch=128, block_rows=16, window_blocks=64)
    near = far = 0
    epochs = 20
    for epoch in range(epochs):
        batch_of = np.empty(4096, dtype=int)
        for step in range(order.steps_per_epoch):
            batch_of[order.sample_ids(epoch * order.steps_per_epoch + step)] = step
        near += (batch_of[0::16] == batch_of[1::16]).sum()
        far += (batch_of == np.roll(batch_of, 2048)).sum()
    assert near / epochs / 256 == pytest.approx(127 / 1023, rel=0.15)
    assert far / epochs / 4096 == pytest.approx(127 / 4095, rel=0.15)
    ids = order.sample_ids(0)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.25
