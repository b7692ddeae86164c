"""A rank's micro batches as tensors on its device; on a GPU the next one comes meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_ray.model.towers import without_padding

Batch = dict[str, Tensor]


def on_device(
    micro_batches: Iterator[dict[str, NDArray[Any]]], device: torch.device, with_image_ids: bool
) -> Iterator[Batch]:
    """Each of data.stream's micro batches as Engine.train_step takes it, without padding.

    On a GPU a thread takes the next one from the stream and copies it, on a CUDA stream of its own,
    while a step is computed.
    """
    # Ray's arrays are read-only, and nobody writes to them. Once, since a change of the filters has
    # Python show all other warnings again.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    batches = (_tensors(micro_batch, with_image_ids) for micro_batch in micro_batches)
    return _ahead(batches, device) if device.type == "cuda" else batches


def _tensors(micro_batch: dict[str, NDArray[Any]], with_image_ids: bool) -> Batch:
    tensors = {name: torch.from_numpy(array) for name, array in micro_batch.items()}
    batch = {
        "images": tensors["images"],
        "token_ids": without_padding(tensors["token_ids"], tensors["token_lengths"]),
        "token_lengths": tensors["token_lengths"],
    }
    return batch | ({"image_ids": tensors["sample_ids"]} if with_image_ids else {})


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    copies = torch.cuda.Stream(device)

    def bring() -> Batch | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(copies):
            brought = {name: tensor.to(device) for name, tensor in batch.items()}
        copies.synchronize()
        return brought

    mover = ThreadPoolExecutor(1, thread_name_prefix="feed")
    try:
        coming = mover.submit(bring)
        while (batch := coming.result()) is not None:
            coming = mover.submit(bring)
            for tensor in batch.values():  # its memory is free when the step has used it
                tensor.record_stream(torch.cuda.current_stream(device))
            yield batch
    finally:
        mover.shutdown(wait=False, cancel_futures=True)
