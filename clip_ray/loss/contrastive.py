"""The losses over ranks: each rank its own pairs, contrasted with those of all ranks.

The mean over ranks of what a rank returns is the loss of `reference`; with the parameters'
gradients averaged over ranks, they are its gradient. Every rank must call it, with as many images
and texts as the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_ray.collectives import mean_over_ranks_with_grad, rank, world_size
from clip_ray.config import LossConfig
from clip_ray.loss.gathered import gathered_logsumexp, gathered_softplus
from clip_ray.loss.positives import positive_means
from clip_ray.loss.routes import AllGather, Ring
from clip_ray.loss.tiled import Tiling, tiled_logsumexp, tiled_softplus

# Above this, logits are not held whole; and above that, features neither.
LARGEST_LOGITS_BYTES = 64 * 2**20
LARGEST_GATHERED_BYTES = 2**30
# What a CPU's cache holds; what keeps a GPU busy in little memory.
CPU_TILE, GPU_TILE = 512, 2048


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    image_ids: Tensor | None,
    config: LossConfig,
) -> Tensor:
    """This rank's share of the loss that `config` names.

    image_features: [B, D], text_features: [B·k, D], k captions of each image in turn. scale: [1].
    bias: [1] for the sigmoid loss. image_ids: [B]; images with equal ids, on whatever rank, share
    their captions as positives; None says that no image comes twice.
    """
    method = choose_method(config, image_features, text_features)
    if config.kind == "sigmoid":
        assert bias is not None
        return _sigmoid(image_features, text_features, scale, bias, image_ids, method, config)
    if config.positives == "masked":
        return _masked_info_nce(image_features, text_features, scale, image_ids, method, config)
    return _info_nce(image_features, text_features, scale, image_ids, method, config)


def choose_method(config: LossConfig, images: Tensor, texts: Tensor) -> str:
    """The configured method, or for `auto` the fastest whose memory is small."""
    if config.method != "auto":
        return config.method
    global_texts = len(texts) * world_size()
    if len(images) * global_texts * images.element_size() <= LARGEST_LOGITS_BYTES:
        return "gathered"
    gathered_bytes = global_texts * images.shape[1] * images.element_size()
    return "tiled" if gathered_bytes <= LARGEST_GATHERED_BYTES else "ring"


def _info_nce(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    method: str,
    config: LossConfig,
) -> Tensor:
    # Cross-entropy with a soft target is log-sum-exp less the target's mean logit, and a mean of
    # logits is the logit of a mean of features.
    rows, columns = _logsumexp(images, texts, scale, None, method, config)
    positive_texts, positive_images, _ = positive_means(images, texts, image_ids)
    if config.label_smoothing:
        share = config.label_smoothing
        positive_texts = torch.lerp(positive_texts, mean_over_ranks_with_grad(texts), share)
        positive_images = torch.lerp(positive_images, mean_over_ranks_with_grad(images), share)
    to_texts = rows - scale * (images * positive_texts).sum(1)
    to_images = columns - scale * (texts * positive_images).sum(1)
    return (to_texts.mean() + to_images.mean()) / 2


def _masked_info_nce(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    method: str,
    config: LossConfig,
) -> Tensor:
    captions = len(texts) // len(images)
    if image_ids is None:
        image_ids = torch.arange(len(images), device=images.device) + rank() * len(images)
    ids = image_ids, image_ids.repeat_interleave(captions)
    rows, columns = _logsumexp(images, texts, scale, ids, method, config)
    own = scale * (images.repeat_interleave(captions, 0) * texts).sum(1)
    to_texts = _softplus(rows.repeat_interleave(captions) - own)
    return (to_texts.mean() + _softplus(columns - own).mean()) / 2


def _sigmoid(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    method: str,
    config: LossConfig,
) -> Tensor:
    # -log sigmoid(l) = softplus(l) - l: all pairs as negatives, then the positives' logits.
    if method == "gathered":
        rows = gathered_softplus(images, texts, scale, bias)
    else:
        rows = tiled_softplus(images, texts, scale, bias, _tiling(method, config, images.device))
    positive_texts, _, counts = positive_means(images, texts, image_ids)
    positive_logits = counts * (scale * (images * positive_texts).sum(1) + bias)
    return (rows - positive_logits).sum() / len(texts)


def _logsumexp(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    method: str,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    if method == "gathered":
        return gathered_logsumexp(images, texts, scale, ids)
    return tiled_logsumexp(images, texts, scale, ids, _tiling(method, config, images.device))


def _tiling(method: str, config: LossConfig, device: torch.device) -> Tiling:
    tile = config.tile or (CPU_TILE if device.type == "cpu" else GPU_TILE)
    return Tiling(Ring() if method == "ring" else AllGather(), tile)


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus leaves the curve at 20, where e^-20 still counts
