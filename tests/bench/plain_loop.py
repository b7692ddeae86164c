"""The peer of the demo: one process, plain PyTorch, the same files, towers and recipe.

    python tests/bench/plain_loop.py --data .clip-ray/raw/shapes --json

No Ray, no DeepSpeed, no S3: what a careful person writes in an afternoon. The towers come from the
same config, so that the difference in R@1 is the harness's.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip_ray.config import Config
from clip_ray.config_file import load_config, shipped
from clip_ray.data.images import decode_rgb
from clip_ray.data.shapes import write_shapes
from clip_ray.data.tokenizer import CaptionTokenizer, make_tokenizer
from clip_ray.data.transforms import augment, center_crop
from clip_ray.loss.reference import info_nce_reference
from clip_ray.model.clip import CLIP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="raw folder; written if absent")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("overrides", nargs="*", help="section.field=value, as for clip-ray")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    config = load_config(shipped("jobs/configs/shapes.yaml"), arguments.overrides)
    write_shapes(arguments.data)
    started = time.monotonic()
    splits = read_splits(arguments.data)
    captions = (caption for record in splits["train"] for caption in record.captions)
    tokenizer = make_tokenizer(config.model.text, captions)
    model = train(config, splits["train"], tokenizer)
    result = recall_at_1(config, model, splits["test"], tokenizer)
    result["seconds"] = round(time.monotonic() - started, 1)
    for name, value in result.items():
        print(f"{name:28} {value:.4f}")
    if arguments.json:
        print(json.dumps(result))


@dataclass
class Record:
    path: Path
    captions: list[str]


def read_splits(folder: Path) -> dict[str, list[Record]]:
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    for image in json.loads((folder / "dataset_flickr30k.json").read_text())["images"]:
        captions = [sentence["raw"] for sentence in image["sentences"]]
        path = folder / "flickr30k-images" / image["filename"]
        splits[image["split"]].append(Record(path, captions))
    return splits


def train(config: Config, records: list[Record], tokenizer: CaptionTokenizer) -> CLIP:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    images = [decode_rgb(record.path.read_bytes()) for record in records]
    model = CLIP(config.model, tokenizer.vocab_size, config.loss)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optim, batch = config.optim, config.train.global_batch
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=optim.lr, betas=optim.betas, eps=optim.eps,
    )  # fmt: skip
    steps = len(images) // batch * config.train.epochs
    warm_up = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1 / optim.warmup_steps, total_iters=optim.warmup_steps
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - optim.warmup_steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warm_up, cosine], [optim.warmup_steps]
    )
    for step in range(steps):
        step_of_epoch = step % (len(images) // batch)
        if step_of_epoch == 0:
            order = rng.permutation(len(images))
        ids = order[step_of_epoch * batch : (step_of_epoch + 1) * batch]
        crops = [
            augment(np.asarray(images[i]), config.model.image.size, config.data, rng) for i in ids
        ]
        texts = [records[i].captions[rng.integers(len(records[i].captions))] for i in ids]
        loss = info_nce_reference(*features(model, np.stack(crops), texts, tokenizer))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip_norm or torch.inf)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(config.loss.max_scale)))
    return model


def features(
    model: CLIP, crops: np.ndarray, texts: list[str], tokenizer: CaptionTokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    token_ids, lengths = map(torch.from_numpy, tokenizer(texts))
    images, sentences, scale, _ = model(torch.from_numpy(crops), token_ids, lengths)
    assert images is not None
    assert sentences is not None
    return images, sentences, scale


@torch.no_grad()
def recall_at_1(
    config: Config, model: CLIP, records: list[Record], tokenizer: CaptionTokenizer
) -> dict[str, float]:
    crops = [center_crop(decode_rgb(r.path.read_bytes()), config.model.image.size) for r in records]
    texts = [caption for record in records for caption in record.captions]
    images, sentences, _ = features(model, np.stack(crops), texts, tokenizer)
    scores = sentences @ images.T
    owner = torch.arange(len(records)).repeat_interleave(len(records[0].captions))
    return {
        "image_retrieval_recall@1": (scores.argmax(1) == owner).double().mean().item(),
        "text_retrieval_recall@1": (owner[scores.argmax(0)] == torch.arange(len(records)))
        .double()
        .mean()
        .item(),
    }


if __name__ == "__main__":
    main()
