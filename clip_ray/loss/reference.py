"""The definition of each loss: one process, the whole batch, nothing clever.

Shapes: N images, M = N·k texts; text j is a caption of image j // k, its pair. Row i and column j
are positives of each other where their ids are equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce_reference(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    image_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3).

    image_features: [N, D], text_features: [M, D], of unit length. scale: [1], exp(logit_scale).
    image_ids: [N]; without them, every image is its own. Several positives share the target
    equally.
    """
    logits = scale * image_features @ text_features.T
    positive = positives(image_features, text_features, image_ids).to(logits.dtype)
    to_texts = positive / positive.sum(1, keepdim=True)
    to_images = positive.T / positive.T.sum(1, keepdim=True)
    return (
        F.cross_entropy(logits, to_texts, label_smoothing=label_smoothing)
        + F.cross_entropy(logits.T, to_images, label_smoothing=label_smoothing)
    ) / 2


def masked_info_nce_reference(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    image_ids: Tensor | None = None,
) -> Tensor:
    """The same for each pair alone, against negatives only: other positives are left out.

    The mean over pairs of -log(e^p / (e^p + sum of e^n)), p the pair's logit, n its image's
    negatives one way and its text's negatives the other.
    """
    logits = scale * image_features @ text_features.T
    positive = positives(image_features, text_features, image_ids)
    pairs = torch.arange(len(text_features), device=logits.device)
    images_of_pairs = pairs // (len(text_features) // len(image_features))
    own = logits[images_of_pairs, pairs]
    negatives = logits.masked_fill(positive, -torch.inf)
    against_texts = torch.cat([own[:, None], negatives[images_of_pairs]], dim=1).logsumexp(1)
    against_images = torch.cat([own[:, None], negatives.T], dim=1).logsumexp(1)
    return ((against_texts - own).mean() + (against_images - own).mean()) / 2


def sigmoid_reference(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Sigmoid loss of SigLIP (Zhai et al. 2023, algorithm 1), summed over all N·M, per text.

    bias: [1], added to the logits.
    """
    logits = scale * image_features @ text_features.T + bias
    sign = 2 * positives(image_features, text_features, image_ids).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(text_features)


def positives(
    image_features: Tensor, text_features: Tensor, image_ids: Tensor | None = None
) -> Tensor:
    """Which text is a caption of which image: [N, M] bool."""
    images, texts = len(image_features), len(text_features)
    if image_ids is None:
        image_ids = torch.arange(images, device=image_features.device)
    return image_ids[:, None] == image_ids.repeat_interleave(texts // images)
