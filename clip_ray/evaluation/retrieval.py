"""Image-text retrieval: recall at k, as CLIP_benchmark computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1024


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, recall_at: Sequence[int]
) -> dict[str, float]:
    """R@k both ways, as shares in [0, 1], a block of the scores at a time.

    image_features: [N, D], text_features: [T, D], of unit length; image_of_text: [T] int64, the
    image that each text describes. `image_retrieval_recall@k` is text→image;
    `text_retrieval_recall@k` image→text, a hit when any of the image's texts is among the first k.
    Among equal scores the right one counts as the last: a collapsed model finds nothing.
    """
    text_to_image = _ranks_of_images(image_features, text_features, image_of_text)
    image_to_text = _ranks_of_texts(image_features, text_features, image_of_text)
    return {
        **{f"image_retrieval_recall@{k}": _share(text_to_image < k) for k in recall_at},
        **{f"text_retrieval_recall@{k}": _share(image_to_text < k) for k in recall_at},
    }


def _ranks_of_images(images: Tensor, texts: Tensor, image_of_text: Tensor) -> Tensor:
    """For each text, how many other images score at least as high as its own: [T]."""
    ranks = []
    for start in range(0, len(texts), _BLOCK):
        scores = texts[start : start + _BLOCK] @ images.T
        own = scores.gather(1, image_of_text[start : start + _BLOCK, None])
        ranks.append((scores >= own).sum(1) - 1)
    return torch.cat(ranks)


def _ranks_of_texts(images: Tensor, texts: Tensor, image_of_text: Tensor) -> Tensor:
    """For each image, how many foreign texts score at least as high as its best own one: [N]."""
    ranks = []
    for start in range(0, len(images), _BLOCK):
        scores = images[start : start + _BLOCK] @ texts.T
        numbers = torch.arange(start, start + len(scores), device=scores.device)
        is_own = image_of_text[None, :] == numbers[:, None]
        best_own = scores.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best_own) & ~is_own).sum(1))
    return torch.cat(ranks)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
