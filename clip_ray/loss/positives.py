"""The positives of each image and text: means of their features, found by image id."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_ray.collectives import all_gather, all_gather_with_grad


def positive_means(
    images: Tensor, texts: Tensor, image_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of each image's texts [B, D], of each text's images [C, D], and counts [B].

    images: [B, D], texts: [B·k, D], image_ids: [B]; None says that no image comes twice, and
    needs no communication. Otherwise every rank must call it.
    """
    captions = len(texts) // len(images)
    all_ids = None if image_ids is None else all_gather(image_ids)
    if image_ids is None or all_ids is None or len(all_ids.unique()) == len(all_ids):
        counts = images.new_full((len(images),), captions)
        if captions == 1:
            return texts, images, counts
        means = texts.unflatten(0, (len(images), captions)).mean(1)
        return means, images.repeat_interleave(captions, 0), counts
    # Some image comes twice, perhaps on two ranks.
    unique, places, repeats = all_ids.unique(return_inverse=True, return_counts=True)
    mine = torch.searchsorted(unique, image_ids)
    all_texts, all_images = all_gather_with_grad(texts), all_gather_with_grad(images)
    text_means = _means(all_texts, places.repeat_interleave(captions), len(unique))
    image_means = _means(all_images, places, len(unique))
    counts = (captions * repeats[mine]).to(images.dtype)
    return text_means[mine], image_means[mine.repeat_interleave(captions)], counts


def _means(features: Tensor, groups: Tensor, count: int) -> Tensor:
    sums = features.new_zeros(count, features.shape[1]).index_add(0, groups, features)
    sizes = features.new_zeros(count).index_add(0, groups, features.new_ones(len(groups)))
    return sums / sizes.clamp_min(1)[:, None]
