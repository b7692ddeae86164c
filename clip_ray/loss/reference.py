"""The definition of each loss: one process, the whole batch, nothing clever."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_reference(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    image_features, text_features: [G, D], of unit length; row i of one belongs to row i of the
    other. scale: [1], exp(logit_scale).
    """
    logits = scale * image_features @ text_features.T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
