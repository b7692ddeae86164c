"""What makes two attempts the same run: its order, its identity, and where its parts are kept."""

from __future__ import annotations

from clip_ray.config import Config
from clip_ray.data.order import Order
from clip_ray.data.shards import Manifest
from clip_ray.data.tokenizer import CaptionTokenizer

METRICS_KEY = "metrics.jsonl"
TOKENIZER_KEY = "tokenizer.json"


def make_order(config: Config, manifest: Manifest) -> Order:
    """The order of the train split."""
    return Order(config.seed, manifest.rows("train"), config.train.global_batch)


def run_identity(config: Config, manifest: Manifest, tokenizer: CaptionTokenizer) -> dict[str, str]:
    """What must stay as it is from one attempt of a run to the next."""
    model = config.model.model_dump_json(exclude={"preset"})
    return {
        "seed": str(config.seed),
        "model": model,
        "loss": config.loss.model_dump_json(),
        "optim": config.optim.model_dump_json(),
        "train.epochs": str(config.train.epochs),
        "train.global_batch": str(config.train.global_batch),
        "data": manifest.sha256,
        "tokenizer": tokenizer.sha256,
    }
