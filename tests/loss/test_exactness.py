"""Each loss by each method, at each world size, is the plain one: value and every gradient.

In float64, to 1e-12 relative. One process group for each world size holds all its cases.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from process_group import device, run_on_gpu, run_ranks
from torch import Tensor, nn

from clip_ray.collectives import rank, world_size
from clip_ray.config import LossConfig
from clip_ray.loss.contrastive import contrastive_loss
from clip_ray.loss.reference import (
    info_nce_reference,
    masked_info_nce_reference,
    sigmoid_reference,
)

IMAGES, WIDTH, DIM = 12, 7, 5
# Images 0 and 11 are one, and so are 3, 4 and 7: within ranks and among them.
TWICE = [0, 1, 2, 3, 3, 5, 6, 3, 8, 9, 10, 0]


@dataclass(frozen=True)
class Loss:
    """A loss, its captions per image, and whether images come twice."""

    captions: int = 1
    twice: bool = False
    kind: str = "info_nce"
    positives: str = "shared"
    label_smoothing: float = 0.0

    @property
    def image_ids(self) -> Tensor | None:
        return torch.tensor(TWICE, device=device()) if self.twice else None

    def config(self, method: str, tile: int) -> LossConfig:
        fields = {"kind": self.kind, "positives": self.positives, "method": method, "tile": tile}
        return LossConfig.model_validate(fields | {"label_smoothing": self.label_smoothing})

    def reference(self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if self.kind == "sigmoid":
            return sigmoid_reference(images, texts, scale, bias, self.image_ids)
        if self.positives == "masked":
            return masked_info_nce_reference(images, texts, scale, self.image_ids)
        smoothing = self.label_smoothing
        return info_nce_reference(images, texts, scale, self.image_ids, smoothing) + 0 * bias.sum()


LOSSES = [
    Loss(),
    Loss(label_smoothing=0.1),
    Loss(captions=2),
    Loss(captions=2, twice=True, label_smoothing=0.2),
    Loss(positives="masked"),
    Loss(captions=2, twice=True, positives="masked"),
    Loss(kind="sigmoid"),
    Loss(captions=2, twice=True, kind="sigmoid"),
]
# Tiles of one, of sizes that do not divide the rows, and larger than all.
METHODS = [
    ("gathered", 1), ("tiled", 1), ("tiled", 3), ("tiled", 5), ("tiled", 64),
    ("ring", 1), ("ring", 5), ("ring", 64), ("auto", 3),
]  # fmt: skip
CASES = list(itertools.product(LOSSES, METHODS))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(WIDTH, DIM, dtype=torch.float64)
        self.text = nn.Linear(WIDTH, DIM, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)], dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor([-3.0], dtype=torch.float64))
        self.to(device())

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        unit = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        return *unit, self.logit_scale.exp(), self.logit_bias


def batch(captions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, WIDTH, generator=generator, dtype=torch.float64)
    texts = torch.randn(IMAGES * captions, WIDTH, generator=generator, dtype=torch.float64)
    return images.to(device()), texts.to(device())


def outcomes_of_this_rank(every: int) -> list[dict[str, Tensor]]:
    return [outcome(loss, *method) for loss, method in CASES[::every]]


def outcome(loss: Loss, method: str, tile: int) -> dict[str, Tensor]:
    towers = Towers()
    images, texts = (part.chunk(world_size())[rank()] for part in batch(loss.captions))
    ids = None if loss.image_ids is None else loss.image_ids.chunk(world_size())[rank()]
    image_features, text_features, scale, bias = towers(images, texts)
    value = contrastive_loss(
        image_features, text_features, scale, bias, ids, loss.config(method, tile)
    )
    return {"loss": value.detach(), **gradients(towers, value)}


def gradients(towers: Towers, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in towers.named_parameters()
    }


@pytest.mark.cluster
@pytest.mark.exactness
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_mean_over_ranks_is_one_process_on_the_whole_batch(ranks: int) -> None:
    compare(ranks, every=1)


@pytest.mark.cluster
def test_a_sample_of_the_cases_at_an_odd_world_size() -> None:
    compare(3, every=7)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    check([run_on_gpu(outcomes_of_this_rank, 1)], every=1)


def compare(ranks: int, every: int) -> None:
    check(run_ranks(ranks, outcomes_of_this_rank, every), every)
    print(f"{len(CASES[::every])} cases at world size {ranks}")


def check(by_rank: list[list[dict[str, Tensor]]], every: int) -> None:
    for number, (loss, method) in enumerate(CASES[::every]):
        towers = Towers()
        value = loss.reference(*towers(*batch(loss.captions)))
        expected = {"loss": value.detach(), **gradients(towers, value)}
        for name, wanted in expected.items():
            found = torch.stack([outcomes[number][name] for outcomes in by_rank]).mean(0)
            assert (found - wanted).norm() <= 1e-12 * wanted.norm(), (loss, method, name)
