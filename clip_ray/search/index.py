"""The index of a split's images: features in safetensors, names and captions in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor

from clip_ray.errors import RunError
from clip_ray.storage import Storage

FEATURES, ENTRIES = "index/features.safetensors", "index/entries.json"


@dataclass(frozen=True)
class Hit:
    """An image that was found."""

    filename: str
    score: float
    captions: list[str]


@dataclass(frozen=True)
class Index:
    """Images that can be searched: features [N, D] of unit length, in the entries' order."""

    features: Tensor
    filenames: list[str]
    captions: list[list[str]]

    def search(self, query: Tensor, top: int) -> list[Hit]:
        """The `top` images nearest to `query` [D], the nearest first."""
        scores, rows = (self.features @ query.to(self.features.device)).topk(
            min(top, len(self.filenames))
        )
        return [
            Hit(self.filenames[row], score, self.captions[row])
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True)
        ]


def write_index(
    run: Storage, filenames: Sequence[str], captions: Sequence[Sequence[str]], features: Tensor
) -> None:
    """Puts the index of a run; the entries last, since they tell that it is there."""
    run.write_bytes(FEATURES, save({"image_features": features.contiguous()}))
    entries = [
        {"filename": filename, "captions": list(texts)}
        for filename, texts in zip(filenames, captions, strict=True)
    ]
    run.write_json(ENTRIES, entries)


def read_index(run: Storage) -> Index:
    """The index of a run. Raises RunError where there is none."""
    if not run.exists(ENTRIES):
        raise RunError(f"{run.uri('index')}: there is no index; run `clip-ray evaluate` first")
    entries = run.read_json(ENTRIES)
    return Index(
        features=load(run.read_bytes(FEATURES))["image_features"],
        filenames=[entry["filename"] for entry in entries],
        captions=[entry["captions"] for entry in entries],
    )
