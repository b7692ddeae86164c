"""The embedding job: every image and caption of a split through the model, by Ray Data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor

from clip_ray.data.images import decode_rgb
from clip_ray.data.shards import Shard
from clip_ray.model.pretrained import PretrainedCLIP, load_model
from clip_ray.storage import Storage, arrow_filesystem


@dataclass(frozen=True)
class EmbeddedSplit:
    """A split with its features, in the order of its shards."""

    filenames: list[str]
    captions: list[list[str]]
    labels: list[str | None]
    image_features: Tensor  # [N, D]
    text_features: Tensor  # [T, D], image by image
    image_of_text: Tensor  # [T] int64


def embed_split(data: Storage, shards: list[Shard], weights: str, batch: int) -> EmbeddedSplit:
    """Embeds `shards` with the model at `weights`. Needs a running Ray."""
    paths = [data.arrow_path(shard.key) for shard in shards]
    encoder: Any = _Encoder
    one_actor = ray.data.ActorPoolStrategy(size=1)
    rows = (
        ray.data.read_parquet(paths, filesystem=arrow_filesystem())
        .map_batches(
            encoder, fn_constructor_args=(weights,), batch_size=batch, compute=one_actor, num_cpus=1
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["image_id"])
    counts = [len(row["captions"]) for row in rows]
    texts = [row["text_features"].reshape(n, -1) for row, n in zip(rows, counts, strict=True) if n]
    images = np.stack([row["image_features"] for row in rows])
    return EmbeddedSplit(
        filenames=[row["filename"] for row in rows],
        captions=[list(row["captions"]) for row in rows],
        labels=[row["label"] for row in rows],
        image_features=torch.from_numpy(images),
        text_features=torch.from_numpy(np.concatenate(texts) if texts else images[:0]),
        image_of_text=torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)),
    )


class _Encoder:
    """One model, kept by an actor: batches of rows in, the same rows with features out."""

    def __init__(self, weights: str) -> None:
        self._model: PretrainedCLIP = load_model(weights)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = [decode_rgb(data) for data in batch.pop("image")]
        captions = [list(group) for group in batch["captions"]]
        texts = [caption for group in captions for caption in group]
        features = self._model.encode_text(texts).cpu().numpy() if texts else np.empty((0, 1))
        ends = np.cumsum([len(group) for group in captions])[:-1]
        groups = np.empty(len(captions), dtype=object)
        for row, part in enumerate(np.split(features, ends)):
            groups[row] = part.astype(np.float32).ravel()
        batch["text_features"] = groups
        batch["image_features"] = self._model.encode_image(images).cpu().numpy()
        return batch
