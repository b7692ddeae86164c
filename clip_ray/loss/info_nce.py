"""CLIP's loss over the global batch, each rank with its own rows of the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ray.collectives import all_gather_with_grad, rank


def info_nce(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """This rank's share of the symmetric cross-entropy; the mean over ranks is the loss.

    image_features, text_features: [B, D], of unit length. scale: [1]. Every rank must call it.
    With the parameters' gradients averaged over ranks, they are those of `info_nce_reference` on
    the global batch: no rank holds more than B×G logits each way.
    """
    all_images = all_gather_with_grad(image_features)
    all_texts = all_gather_with_grad(text_features)
    local_batch = len(image_features)
    first = rank() * local_batch
    targets = torch.arange(first, first + local_batch, device=image_features.device)
    image_logits = scale * image_features @ all_texts.T
    text_logits = scale * text_features @ all_images.T
    return (F.cross_entropy(image_logits, targets) + F.cross_entropy(text_logits, targets)) / 2
