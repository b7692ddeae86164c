"""Zero-shot classification, as CLIP_benchmark computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def class_features(
    classes: Sequence[str], templates: Sequence[str], encode_text: Callable[[list[str]], Tensor]
) -> Tensor:
    """One unit vector per class: the mean over the templates, renormalised: [C, D]."""
    rows = []
    for name in classes:
        prompts = encode_text([template.format(name) for template in templates])
        rows.append(F.normalize(F.normalize(prompts, dim=-1).mean(0), dim=-1))
    return torch.stack(rows)


def zero_shot_metrics(
    image_features: Tensor, labels: Tensor, class_features_CD: Tensor
) -> dict[str, float]:
    """acc1, acc5 (NaN under five classes) and mean_per_class_recall, as shares in [0, 1].

    image_features: [N, D]; labels: [N] int64; class_features_CD: [C, D].
    """
    logits = 100 * image_features @ class_features_CD.T
    classes = class_features_CD.shape[0]
    first = logits.argmax(1)
    recalls = [(first[labels == c] == c).double().mean() for c in labels.unique().tolist()]
    acc5 = math.nan
    if classes >= 5:
        acc5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    return {
        "acc1": (first == labels).double().mean().item(),
        "acc5": acc5,
        "mean_per_class_recall": torch.stack(recalls).mean().item(),
    }
