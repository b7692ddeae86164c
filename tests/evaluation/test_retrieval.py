"""Recall at k equals a count by hand; a collapsed model finds nothing."""

import torch
import torch.nn.functional as F

from clip_ray.evaluation.retrieval import retrieval_metrics
from clip_ray.evaluation.zero_shot import class_features, zero_shot_metrics


def test_recalls_equal_the_plain_protocol() -> None:
    torch.manual_seed(0)
    images = F.normalize(torch.randn(40, 8), dim=-1)
    owners = torch.arange(40).repeat_interleave(5)
    texts = F.normalize(images[owners] + 0.6 * torch.randn(200, 8), dim=-1)
    metrics = retrieval_metrics(images, texts, owners, (1, 5))
    scores = texts @ images.T
    for k in (1, 5):
        found = (scores.topk(k, dim=1).indices == owners[:, None]).any(1)
        assert metrics[f"image_retrieval_recall@{k}"] == found.double().mean()
        found = (owners[scores.T.topk(k, dim=1).indices] == torch.arange(40)[:, None]).any(1)
        assert metrics[f"text_retrieval_recall@{k}"] == found.double().mean()


def test_a_collapsed_model_finds_nothing() -> None:
    same = torch.ones(10, 4) / 2
    metrics = retrieval_metrics(same, same, torch.arange(10), (1, 5))
    assert set(metrics.values()) == {0.0}


def test_zero_shot_counts_right_classes() -> None:
    classes = class_features(["a", "b"], ["{}"], lambda texts: torch.eye(2)[[ord(texts[0]) - 97]])
    metrics = zero_shot_metrics(torch.eye(2)[[0, 0, 1, 0]], torch.tensor([0, 0, 1, 1]), classes)
    assert metrics["acc1"] == 0.75
    assert metrics["mean_per_class_recall"] == 0.75
    assert metrics["acc5"] != metrics["acc5"]
