"""The order is a function: a permutation each epoch, at any size, from any step."""

import numpy as np
import pytest

from clip_ray.data.order import Order, permute


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    positions = np.arange(size, dtype=np.uint64)
    assert sorted(permute(positions, size, key=7)) == list(range(size))


def test_every_sample_at_most_once_an_epoch_and_epochs_differ() -> None:
    order = Order(seed=3, num_samples=103, global_batch=10)
    epochs = [
        np.concatenate([order.sample_ids(epoch * 10 + step) for step in range(10)])
        for epoch in range(2)
    ]
    assert all(len(set(ids.tolist())) == 100 for ids in epochs)
    assert (epochs[0] != epochs[1]).any()


def test_any_step_of_a_huge_set_is_reached_directly() -> None:
    order = Order(seed=0, num_samples=400_000_000, global_batch=1024)
    ids = order.sample_ids(order.steps_per_epoch * 5 + 123_456)
    assert len(set(ids.tolist())) == 1024
    assert ids.max() < 400_000_000


def test_neighbours_are_scattered() -> None:
    ids = Order(seed=1, num_samples=29_000, global_batch=29_000).sample_ids(0)
    correlation = np.corrcoef(ids[:-1], ids[1:])[0, 1]
    assert abs(correlation) < 0.02
