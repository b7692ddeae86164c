"""What arrives on the device: the stream's micro batches, without padding, in order."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from clip_ray.training.feed import on_device

LENGTHS = [3, 17, 9, 40]


def micro_batches() -> Iterator[dict[str, Any]]:
    for number, length in enumerate(LENGTHS):
        yield {
            "images": np.full((2, 8, 8, 3), number, dtype=np.uint8),
            "token_ids": np.full((2, 1, 40), number, dtype=np.int32),
            "token_lengths": np.array([[2], [length]], dtype=np.int32),
            "sample_ids": np.array([number, -1]),
        }


def check(device: str) -> None:
    seen = []
    for batch in on_device(micro_batches(), torch.device(device), with_image_ids=True):
        time.sleep(0.05)  # the next one has come long before it is asked for
        assert {tensor.device.type for tensor in batch.values()} == {device}
        assert batch["token_lengths"].max() == LENGTHS[len(seen)]
        seen.append((batch["images"].unique().tolist(), batch["token_ids"].shape[-1]))
        assert batch["image_ids"].tolist() == [len(seen) - 1, -1]
    assert seen == [([0], 8), ([1], 24), ([2], 16), ([3], 40)]


def test_texts_end_with_the_longest() -> None:
    check("cpu")


@pytest.mark.gpu
def test_batches_come_to_a_gpu_one_ahead() -> None:
    check("cuda")


def test_image_ids_come_where_they_are_asked_for() -> None:
    (batch, *_) = on_device(micro_batches(), torch.device("cpu"), with_image_ids=False)
    assert batch.keys() == {"images", "token_ids", "token_lengths"}


def test_a_warning_of_each_step_is_shown_once() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in on_device(micro_batches(), torch.device("cpu"), with_image_ids=False):
            warnings.warn("of each step", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["of each step"]
