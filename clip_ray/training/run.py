"""What makes two attempts the same run: order, stream, random state, identity, where parts are."""

from __future__ import annotations

import numpy as np

from clip_ray.config import Config
from clip_ray.data.order import Order
from clip_ray.data.shards import Manifest, read_manifest
from clip_ray.data.tokenizer import CaptionTokenizer
from clip_ray.data.unit import StreamSpec, stream_spec
from clip_ray.storage import Storage

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


def make_stream_spec(config: Config, tokenizer: CaptionTokenizer) -> StreamSpec:
    """The stream of the train split for workers of this config's world size."""
    data = Storage(config.data_root)
    manifest = read_manifest(data)
    return stream_spec(
        data=config.data,
        storage=data,
        manifest=manifest,
        tokenizer=tokenizer,
        order=make_order(config, manifest),
        world_size=config.cluster.num_workers,
        readers=config.cluster.readers_per_worker,
        reader_labels=config.cluster.reader_labels,
        image_size=config.model.image.size,
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """The random state of a rank in a step: dropout of a resumed run is that of the uncut one."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


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
