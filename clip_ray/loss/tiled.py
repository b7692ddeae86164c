"""Sums over all pairs of the global batch, without more than a tile of the logits in memory.

Each logit is computed once in the whole cluster, by the rank that holds its image: of B×G logits a
rank reduces rows for its own images and columns for everyone's texts. Columns are merged among
ranks, so only texts travel. The backward computes the tiles again.

B: this rank's images, C: this rank's texts, D: the embedding's dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_ray.loss.routes import Route


@dataclass(frozen=True)
class Tiling:
    """How texts reach the ranks, and how many rows and columns of logits are held at a time."""

    route: Route
    tile: int


def tiled_logsumexp(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    """log of the sum of e^logit over all texts of each own image, and all images of each own text.

    images: [B, D], texts: [C, D], scale: [1] -> [B], [C]. ids: those of images [B] and texts [C];
    pairs whose ids are equal are left out. Differentiable once, as if the losses of all ranks were
    summed. Every rank must call it, with the same B and C.
    """
    image_ids, text_ids = ids or (None, None)
    found = _LogSumExp.apply(images, texts, scale, image_ids, text_ids, tiling)
    return found  # type: ignore[return-value]


def tiled_softplus(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, tiling: Tiling
) -> Tensor:
    """The sum of log(1 + e^logit) over all texts, for each own image: [B]; bias: [1].

    Otherwise as `tiled_logsumexp`.
    """
    found = _Softplus.apply(images, texts, scale, bias, tiling)
    return found  # type: ignore[return-value]


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        tiling: Tiling,
    ) -> tuple[Tensor, Tensor]:
        rows = images.new_full((len(images),), -torch.inf)

        def work(block: list[Tensor], columns: Tensor) -> None:
            for r, c in _tiles(images, block[0], tiling.tile):
                logits = _logits(images[r], block[0][c], scale)
                _leave_out(logits, image_ids, block[1:], r, c)
                rows[r] = torch.logaddexp(rows[r], logits.logsumexp(1))
                columns[c] = torch.logaddexp(columns[c], logits.logsumexp(0))

        travelling = [texts, *_present(text_ids)]
        columns = texts.new_full((len(texts),), -torch.inf)
        columns = tiling.route.visit(travelling, columns, work, merge="logsumexp")
        ctx.save_for_backward(images, texts, scale, image_ids, text_ids, rows, columns)
        ctx.tiling = tiling
        return rows, columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        images, texts, scale, image_ids, text_ids, rows, columns = ctx.saved_tensors
        grad_rows, grad_columns = grads
        rows, columns = _finite(rows), _finite(columns)
        grad_images, tile = torch.zeros_like(images), ctx.tiling.tile

        def work(block: list[Tensor], grad_texts: Tensor) -> None:
            texts, columns, grad_columns, *ids = block
            for r, c in _tiles(images, texts, tile):
                logits = _logits(images[r], texts[c], scale)
                _leave_out(logits, image_ids, ids, r, c)
                weights = (logits - columns[c]).exp_().mul_(grad_columns[c])
                weights += logits.sub_(rows[r, None]).exp_().mul_(grad_rows[r, None])
                grad_images[r].addmm_(weights, texts[c])
                grad_texts[c].addmm_(weights.T, images[r])

        travelling = [texts, columns, grad_columns.contiguous(), *_present(text_ids)]
        grad_texts = ctx.tiling.route.visit(travelling, torch.zeros_like(texts), work, merge="sum")
        grad_scale = (images * grad_images).sum().reshape(scale.shape)
        return grad_images.mul_(scale), grad_texts.mul_(scale), grad_scale, None, None, None


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, tiling: Tiling
    ) -> Tensor:
        rows = images.new_zeros(len(images))

        def work(block: list[Tensor], _: Tensor) -> None:
            for r, c in _tiles(images, block[0], tiling.tile):
                logits = _logits(images[r], block[0][c], scale).add_(bias)
                rows[r] -= F.logsigmoid(logits.neg_()).sum(1)

        tiling.route.visit([texts], texts.new_zeros(1), work, merge="sum")  # columns: not asked for
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.tiling = tiling
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        images, texts, scale, bias = ctx.saved_tensors
        (grad_rows,) = grads
        grad_images, grad_bias = torch.zeros_like(images), torch.zeros_like(bias)

        def work(block: list[Tensor], grad_texts: Tensor) -> None:
            for r, c in _tiles(images, block[0], ctx.tiling.tile):
                weights = _logits(images[r], block[0][c], scale).add_(bias).sigmoid_()
                weights *= grad_rows[r, None]
                grad_bias.add_(weights.sum())
                grad_images[r].addmm_(weights, block[0][c])
                grad_texts[c].addmm_(weights.T, images[r])

        grad_texts = ctx.tiling.route.visit([texts], torch.zeros_like(texts), work, merge="sum")
        grad_scale = (images * grad_images).sum().reshape(scale.shape)
        return grad_images.mul_(scale), grad_texts.mul_(scale), grad_scale, grad_bias, None


def _tiles(images: Tensor, texts: Tensor, tile: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, len(images), tile):
        for column in range(0, len(texts), tile):
            yield slice(row, row + tile), slice(column, column + tile)


def _logits(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    return (images @ texts.T).mul_(scale)


def _leave_out(
    logits: Tensor, image_ids: Tensor | None, text_ids: list[Tensor], r: slice, c: slice
) -> None:
    """Takes pairs of one id out of a tile; `text_ids` is empty where none are to go."""
    if image_ids is not None:
        logits.masked_fill_(image_ids[r, None] == text_ids[0][c], -torch.inf)


def _present(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _finite(sums: Tensor) -> Tensor:
    """A sum of nothing is -inf, and -inf - -inf is no number."""
    return sums.clamp_min(torch.finfo(sums.dtype).min)
