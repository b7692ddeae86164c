"""What makes two attempts the same run: its order, its identity, and where its parts are kept."""

from __future__ import annotations

from clip_ray.config import Config
from clip_ray.data.order import Order
from clip_ray.data.shards import Manifest
from clip_ray.data.tokenizer import CaptionTokenizer

AUGMENTATION = {
    "crop_scale", "crop_ratio", "flip_prob", "color_jitter", "color_jitter_prob", "grey_prob",
    "captions_per_image",
}  # fmt: skip
METRICS_KEY = "metrics.jsonl"
TOKENIZER_KEY = "tokenizer.json"


def make_order(config: Config, manifest: Manifest) -> Order:
    """The order of the train split."""
    block_rows = config.data.row_group_rows
    return Order(
        seed=config.seed,
        num_samples=manifest.rows("train"),
        global_batch=config.train.global_batch,
        block_rows=block_rows,
        window_blocks=max(1, config.data.shuffle_window_rows // block_rows),
    )


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
        "data.row_group_rows": str(config.data.row_group_rows),
        "data.shuffle_window_rows": str(config.data.shuffle_window_rows),
        "data.augmentation": config.data.model_dump_json(include=AUGMENTATION),
        "tokenizer": tokenizer.sha256,
    }
