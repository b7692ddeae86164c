"""The loss over ranks has the value and every gradient of one process on the whole batch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from process_group import run_ranks
from torch import Tensor, nn

from clip_ray.collectives import rank, world_size
from clip_ray.loss.info_nce import info_nce
from clip_ray.loss.reference import info_nce_reference

GLOBAL_BATCH, WIDTH, DIM = 12, 7, 5


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(WIDTH, DIM, dtype=torch.float64)
        self.text = nn.Linear(WIDTH, DIM, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)], dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = (F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1))
        return *unit, self.logit_scale.exp()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, GLOBAL_BATCH, WIDTH)
    images, texts = torch.randn(shape, generator=generator, dtype=torch.float64)
    return images, texts


def loss_and_gradients_of_this_rank() -> tuple[Tensor, dict[str, Tensor]]:
    towers = Towers()
    images, texts = (part.chunk(world_size())[rank()] for part in batch())
    loss = info_nce(*towers(images, texts))
    loss.backward()
    return loss.detach(), {name: _gradient(p) for name, p in towers.named_parameters()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.cluster
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mean_over_ranks_is_the_gradient_of_the_whole_batch(ranks: int) -> None:
    towers = Towers()
    expected = info_nce_reference(*towers(*batch()))
    expected.backward()
    results = run_ranks(ranks, loss_and_gradients_of_this_rank)
    loss = torch.stack([loss for loss, _ in results]).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for name, parameter in towers.named_parameters():
        gradient = torch.stack([gradients[name] for _, gradients in results]).mean(0)
        wanted = _gradient(parameter)
        assert (gradient - wanted).norm() <= 1e-12 * wanted.norm(), name
