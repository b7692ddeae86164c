"""The evaluate job: retrieval and zero-shot metrics, and the index that search reads."""

from __future__ import annotations

import math

import torch

from clip_ray.config import Config
from clip_ray.data.records import ZERO_SHOT_SPLIT
from clip_ray.data.shards import read_manifest
from clip_ray.errors import RunError
from clip_ray.evaluation.embed import EmbeddedSplit, embed_splits
from clip_ray.evaluation.retrieval import retrieval_metrics
from clip_ray.evaluation.zero_shot import class_features, zero_shot_metrics
from clip_ray.model.pretrained import load_model
from clip_ray.search.index import write_index
from clip_ray.storage import Storage


def evaluate(config: Config) -> dict[str, dict[str, float]]:
    """Metrics by task, written to the run's `results/` in CLIP_benchmark's form.

    Also writes the index of the evaluated split's images. Needs a running Ray. Raises RunError
    where the run has no weights.
    """
    run, data = Storage(config.run_root), Storage(config.data_root)
    weights = run.uri("weights")
    if not run.exists("weights/model.safetensors"):
        raise RunError(f"{weights}: holds no weights; run `clip-ray train` first")
    manifest = read_manifest(data)
    names = [config.evaluation.split]
    if manifest.rows(ZERO_SHOT_SPLIT):
        names.append(ZERO_SHOT_SPLIT)
    splits = {name: manifest.splits[name] for name in names}
    embedded = embed_splits(data, splits, weights, config.evaluation.batch)
    split = embedded[config.evaluation.split]
    results = {
        "zeroshot_retrieval": retrieval_metrics(
            split.image_features,
            split.text_features,
            split.image_of_text,
            config.evaluation.recall_at,
        )
    }
    write_index(run, split.filenames, split.captions, split.image_features)
    if zero_shot := embedded.get(ZERO_SHOT_SPLIT):
        results["zeroshot_classification"] = _zero_shot(config, zero_shot, weights)
    for task, metrics in results.items():
        _write_result(run, config, task, metrics)
    return results


def _zero_shot(config: Config, split: EmbeddedSplit, weights: str) -> dict[str, float]:
    classes = sorted({label for label in split.labels if label is not None})
    model = load_model(weights)
    features = class_features(classes, config.evaluation.templates, model.encode_text).cpu()
    labels = torch.tensor([classes.index(label) for label in split.labels if label is not None])
    return zero_shot_metrics(split.image_features, labels, features)


def _write_result(run: Storage, config: Config, task: str, metrics: dict[str, float]) -> None:
    model = config.model.preset or config.model.image.timm_name
    result = {
        "dataset": config.data.name,
        "model": model,
        "pretrained": config.name,
        "task": task,
        "metrics": {name: None if math.isnan(value) else value for name, value in metrics.items()},
        "language": "en",
    }
    run.write_json(f"results/{config.data.name}_{config.name}_{model}_en_{task}.json", result)
