"""The embedding job: every image and caption of some splits through the model, by Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


def embed_splits(
    data: Storage, splits: Mapping[str, Sequence[Shard]], weights: str, batch: int
) -> dict[str, EmbeddedSplit]:
    """Embeds the shards of some splits with the model at `weights`. Needs a running Ray."""
    parts = [
        {"split": split, "path": data.arrow_path(shard.key)}
        for split, shards in splits.items()
        for shard in shards
    ]
    encoder: Any = _Encoder
    one_actor = ray.data.ActorPoolStrategy(size=1)
    rows = (
        # Ray's own reader of Parquet starts several actors, which takes longer than a small split.
        ray.data.from_items(parts, override_num_blocks=len(parts))
        .map_batches(_row_groups, batch_size=1)
        .map_batches(
            encoder, fn_constructor_args=(weights,), batch_size=batch, compute=one_actor, num_cpus=1
        )
        .take_all()
    )
    return {split: _split([row for row in rows if row["split"] == split]) for split in splits}


def _row_groups(part: Any) -> Iterator[pa.Table]:
    """The rows of one shard, each with its split."""
    (split,), (path,) = part["split"], part["path"]
    with pq.ParquetFile(arrow_filesystem().open_input_file(path)) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            yield table.append_column("split", pa.repeat(str(split), len(table)))


def _split(rows: list[dict[str, Any]]) -> EmbeddedSplit:
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
