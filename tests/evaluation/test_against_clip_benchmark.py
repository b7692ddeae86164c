"""On the same embeddings our metrics are those of LAION's CLIP_benchmark."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clip_ray.evaluation.retrieval import retrieval_metrics
from clip_ray.evaluation.zero_shot import class_features, zero_shot_metrics

IMAGES, CAPTIONS, CLASSES, DIM = 60, 5, 7, 16


class Lookup:
    """A model whose "images" are features already and whose texts are rows of a table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def encode_image(self, images: Tensor) -> Tensor:
        return images

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def ids_of(texts: list[str]) -> Tensor:
    return torch.tensor([int(text.split()[-1]) for text in texts])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(4)


def test_retrieval() -> None:
    images = F.normalize(torch.randn(IMAGES, DIM), dim=-1)
    owners = torch.arange(IMAGES).repeat_interleave(CAPTIONS)
    texts = F.normalize(images[owners] + 0.8 * torch.randn(IMAGES * CAPTIONS, DIM), dim=-1)
    rows = [
        (images[i], [f"caption {i * CAPTIONS + j}" for j in range(CAPTIONS)]) for i in range(IMAGES)
    ]
    loader = DataLoader(rows, batch_size=16, collate_fn=lambda items: (  # type: ignore[arg-type]
        torch.stack([image for image, _ in items]), [captions for _, captions in items]
    ))  # fmt: skip
    theirs = zeroshot_retrieval.evaluate(
        Lookup(texts), loader, ids_of, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = retrieval_metrics(images, texts, owners, (1, 5, 10))
    assert ours == pytest.approx(theirs, abs=1e-7)


def test_classification() -> None:
    templates = ["a {c} 0", "one {c} 1"]
    prompts = torch.randn(2 * CLASSES, DIM)
    labels = torch.arange(IMAGES) % CLASSES
    images = F.normalize(prompts[2 * labels] + 1.5 * torch.randn(IMAGES, DIM), dim=-1)

    # "a 3 0" is row 6 of the table, "one 3 1" row 7.
    def rows_of(texts: list[str]) -> Tensor:
        return torch.tensor([2 * int(t.split()[1]) + int(t.split()[2]) for t in texts])

    names = [str(number) for number in range(CLASSES)]
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)
    # Its own last step, `accuracy`, does not run on a current numpy.
    model = Lookup(prompts)
    classifier = zeroshot_classification.zero_shot_classifier(
        model, rows_of, names, templates, "cpu", amp=False
    )
    logits, target = zeroshot_classification.run_classification(
        model, classifier, loader, "cpu", amp=False
    )
    theirs = {
        "acc1": float((logits.argmax(1) == target).double().mean()),
        "acc5": float((logits.topk(5).indices == target[:, None]).any(1).double().mean()),
        "mean_per_class_recall": balanced_accuracy_score(target, logits.argmax(1)),
    }
    features = class_features(
        names, [t.replace("{c}", "{}") for t in templates], lambda texts: prompts[rows_of(texts)]
    )
    ours = zero_shot_metrics(images, labels, features)
    assert ours == pytest.approx(theirs, abs=1e-6)
