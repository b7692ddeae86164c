"""Sums over all pairs of the global batch, from this rank's rows of the logits: plain autograd.

Memory: B×G logits each way. What `tiled` computes without them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ray.collectives import all_gather, all_gather_with_grad


def gathered_logsumexp(
    images: Tensor, texts: Tensor, scale: Tensor, ids: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """See `tiled.tiled_logsumexp`."""
    image_logits = scale * images @ all_gather_with_grad(texts).T
    text_logits = scale * texts @ all_gather_with_grad(images).T
    if ids is not None:
        image_ids, text_ids = ids
        image_logits = _mask(image_logits, image_ids[:, None] == all_gather(text_ids))
        text_logits = _mask(text_logits, text_ids[:, None] == all_gather(image_ids))
    return image_logits.logsumexp(1), text_logits.logsumexp(1)


def gathered_softplus(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """See `tiled.tiled_softplus`."""
    return -F.logsigmoid(-(scale * images @ all_gather_with_grad(texts).T + bias)).sum(1)


def _mask(logits: Tensor, positive: Tensor) -> Tensor:
    return logits.masked_fill(positive, -torch.inf)
