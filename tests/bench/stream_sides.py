"""One side of the stream's bench, in a process of its own: python stream_sides.py SIDE OPTIONS.

Every side reads the same JPEGs from the same object store with READERS processes, and ends with one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import boto3
import numpy as np
from measure import measure
from photos import caption, photos
from PIL import Image

from clip_ray.config import Config
from clip_ray.config_file import load_config, shipped
from clip_ray.storage import Storage

READERS, MICRO_BATCH, SIZE = 2, 128, 224


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--root", required=True)
    parser.add_argument("--raw", required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(SIDES[arguments.side](arguments)))


def bench_config(arguments: argparse.Namespace) -> Config:
    return load_config(
        shipped("jobs/configs/shapes.yaml"),
        [
            f"storage.root={arguments.root}", "data.zero_shot_source=null",
            f"data.source={arguments.raw}", "data.layout=jsonl", "data.shorter_side=null",
            f"data.cache_dir={tempfile.gettempdir()}/clip-ray-bench",
            f"model.image.size={SIZE}", f"train.global_batch={MICRO_BATCH}",
            "cluster.num_workers=1", f"cluster.readers_per_worker={READERS}",
        ],
    )  # fmt: skip


def prepare(arguments: argparse.Namespace) -> dict[str, float]:
    """The raw folder to shards, before anything is measured."""
    from clip_ray.data.prepare import is_prepared
    from clip_ray.data.prepare import prepare as job
    from clip_ray.training.session import ray_session

    config = bench_config(arguments)
    storage = Storage(config.data_root)
    if not is_prepared(config.data, storage):
        with ray_session(config):
            job(config.data, storage, lambda line: None)
    return {}


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    from clip_ray.data.shards import read_manifest
    from clip_ray.data.stream import training_stream
    from clip_ray.data.tokenizer import make_tokenizer
    from clip_ray.data.unit import stream_spec
    from clip_ray.training.run import make_order
    from clip_ray.training.session import ray_session

    config = bench_config(arguments)
    shutil.rmtree(str(config.data.cache_dir), ignore_errors=True)
    storage = Storage(config.data_root)
    manifest = read_manifest(storage)

    def batches() -> Iterator[int]:
        spec = stream_spec(
            data=config.data, storage=storage, manifest=manifest,
            tokenizer=make_tokenizer(config.model.text, [caption(0)]),
            order=make_order(config, manifest), world_size=1,
            readers=READERS, image_size=SIZE,
        )  # fmt: skip
        steps = spec.order.steps_per_epoch * arguments.epochs
        for micro_batch in training_stream(spec, 0, range(steps)):
            yield len(torch.from_numpy(micro_batch["images"]))

    with ray_session(config):
        return measure(batches, arguments.images, arguments.epochs)


def open_clip(arguments: argparse.Namespace) -> dict[str, float]:
    """open_clip's webdataset pipeline, with its own transforms and loader settings."""
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    args = SimpleNamespace(
        train_data=[f"pipe:curl -s -f '{url}'" for url in tar_urls(arguments.root)], val_data=None,
        train_num_samples=arguments.images, train_data_upsampling_factors=None,
        dataset_resampled=False, seed=0, batch_size=MICRO_BATCH, workers=READERS, world_size=1,
    )  # fmt: skip
    transform: Any = image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def batches() -> Iterator[int]:
        data = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
        for epoch in range(arguments.epochs):
            data.set_epoch(epoch)
            for images, _ in data.dataloader:
                yield len(images)

    return measure(batches, arguments.images, arguments.epochs)


def hf_datasets(arguments: argparse.Namespace) -> dict[str, float]:
    """Hugging Face datasets, streamed from the same tars, through torch's DataLoader."""
    import open_clip
    from datasets import load_dataset
    from open_clip.transform import image_transform
    from torch.utils.data import DataLoader

    transform: Any = image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def example(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": transform(row["jpg"]), "tokens": tokenizer(row["txt"])[0]}

    def batches() -> Iterator[int]:
        data: Any = load_dataset(
            "webdataset", data_files={"train": tar_urls(arguments.root)}, split="train",
            streaming=True,
        )  # fmt: skip
        data = data.shuffle(seed=0, buffer_size=1000)
        data = data.map(example, remove_columns=["jpg", "txt", "__key__", "__url__"])
        loader: Any = DataLoader(data.with_format("torch"), MICRO_BATCH, num_workers=READERS)
        for epoch in range(arguments.epochs):
            data.set_epoch(epoch)
            for batch in loader:
                yield len(batch["image"])

    return measure(batches, arguments.images, arguments.epochs)


def tar_urls(root: str) -> list[str]:
    storage = Storage(root)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    return [
        client.generate_presigned_url(
            "get_object", Params={"Bucket": storage.bucket, "Key": f"{storage.prefix}/{key}"}
        )
        for key in storage.keys("tars/")
    ]


def bare(arguments: argparse.Namespace) -> dict[str, float]:
    """Decode and crop in as many processes, from memory, with no framework: the limit."""
    from clip_ray.data.transforms import random_resized_crop

    return loop(arguments, random_resized_crop)


def bare_pillow(arguments: argparse.Namespace) -> dict[str, float]:
    """The same loop with Pillow's crop, as the peers have it."""
    return loop(arguments, pillows_crop)


def loop(arguments: argparse.Namespace, crop: Callable[..., Any]) -> dict[str, float]:
    context = multiprocessing.get_context("fork")
    jpegs = list(photos(1000))
    decode_all(jpegs[:1], 1, crop)  # imports what the processes share
    rounds = max(1, arguments.images * arguments.epochs // len(jpegs) // 2)
    started = time.perf_counter()
    processes = [
        context.Process(target=decode_all, args=(jpegs[part::READERS], rounds, crop))
        for part in range(READERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return {"steady": rounds * len(jpegs) / (time.perf_counter() - started)}


def decode_all(jpegs: list[bytes], rounds: int, crop: Callable[..., Any], size: int = SIZE) -> None:
    import torch

    from clip_ray.data.images import decode_prepared

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for jpeg in jpegs:
            crop(decode_prepared(jpeg), size, (0.9, 1.0), (0.75, 4 / 3), rng)


def pillows_crop(pixels: Any, size: int, *drawn: Any) -> Any:
    from clip_ray.data.transforms import random_box

    left, top, right, bottom = random_box(pixels.shape[1], pixels.shape[0], *drawn)
    part = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


SIDES = {
    "prepare": prepare,
    "ours": ours,
    "open_clip": open_clip,
    "hf_datasets": hf_datasets,
    "bare": bare,
    "bare_pillow": bare_pillow,
}

if __name__ == "__main__":
    main()
