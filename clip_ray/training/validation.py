"""Retrieval on the validation split at the end of an epoch, shared among the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clip_ray.collectives import gather_rows, max_over_ranks, rank, world_size
from clip_ray.config import Config
from clip_ray.data.images import decode_rgb
from clip_ray.data.reader import open_reader
from clip_ray.data.shards import Manifest, read_column
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.transforms import center_crop
from clip_ray.evaluation.retrieval import retrieval_metrics
from clip_ray.model.towers import without_padding
from clip_ray.storage import Storage
from clip_ray.training.engine import Engine


class Validation:
    """This rank's part of the val split, decoded once and kept in memory as uint8.

    Every rank must make one and call it at the same steps.
    """

    def __init__(
        self, config: Config, data: Storage, manifest: Manifest, tokenizer: CaptionTokenizer
    ) -> None:
        shards = manifest.splits["val"]
        captions = list(read_column(data, shards, "captions"))
        texts = [caption for group in captions for caption in group]
        owners = np.repeat(np.arange(len(captions)), [len(group) for group in captions])
        reader = open_reader(config.data, data, shards)
        my_images = np.array_split(np.arange(len(captions)), world_size())[rank()]
        my_texts = np.array_split(np.arange(len(texts)), world_size())[rank()]
        tower = config.model.image
        crops = [
            center_crop(decode_rgb(row["image"]), tower.size, tower.center_crop)
            for row in reader.rows(my_images.tolist())
        ]
        token_ids, lengths = tokenizer([texts[i] for i in my_texts])
        self._images = torch.from_numpy(np.stack(crops))
        self._tokens = torch.from_numpy(token_ids), torch.from_numpy(lengths)
        self._image_of_text = torch.from_numpy(owners)
        self._batch = config.evaluation.batch
        self._recall_at = config.evaluation.recall_at

    def __call__(self, engine: Engine) -> dict[str, float]:
        """R@k of the whole split, the same on every rank."""
        images = self._encode(
            len(self._images), lambda rows: engine.encode(images=self._images[rows])[0]
        )
        ids, lengths = self._tokens
        texts = self._encode(
            len(ids),
            lambda rows: engine.encode(
                token_ids=without_padding(ids[rows], lengths[rows]), token_lengths=lengths[rows]
            )[1],
        )
        return retrieval_metrics(images, texts, self._image_of_text, self._recall_at)

    def _encode(self, count: int, encode: Callable[[Tensor], Tensor | None]) -> Tensor:
        """All ranks' features [N, D]: the same number of forwards on each, as ZeRO-3 needs."""
        # array_split's parts differ by one at most, rank 0's being the largest.
        largest = count if rank() == 0 else count + 1
        forwards = (
            math.ceil(largest / self._batch) if world_size() > 1 else math.ceil(count / self._batch)
        )
        (forwards,) = max_over_ranks([forwards])
        parts = []
        for number in range(forwards):
            rows = torch.arange(number * self._batch, (number + 1) * self._batch).clamp(
                max=count - 1
            )
            features = encode(rows.unique())
            assert features is not None
            parts.append(features)
        # Gathered where they are: NCCL takes nothing from a CPU.
        return gather_rows(torch.cat(parts)[:count]).cpu()
