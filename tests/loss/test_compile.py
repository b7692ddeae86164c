"""The tiled losses under torch.compile: the same value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ray.config import LossConfig
from clip_ray.loss.contrastive import contrastive_loss


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_compiled_is_what_is_not(kind: str) -> None:
    config = LossConfig.model_validate({"kind": kind, "method": "tiled", "tile": 5})

    def loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        unit = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
        return contrastive_loss(*unit, scale.exp(), bias, image_ids=None, config=config)

    compiled = torch.compile(loss, backend="aot_eager")
    results = [with_gradients(function) for function in (loss, compiled)]
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(plain, fast)


def with_gradients(loss) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    inputs += [torch.tensor([2.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()
    value = loss(*inputs)
    value.backward()
    return [value.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]
