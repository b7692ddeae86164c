"""The stream against open_clip's webdataset pipeline and the bare loop, on the same cores, from S3.

    python tests/bench/stream.py [--images 6000] [--epochs 3] [--repeats 3] [--json]

Each side runs in processes of its own, in turn, over the same JPEGs in the same object store (the
embedded one, unless AWS_ENDPOINT_URL names another), with two reader processes. `steady` leaves out
the first part of the first epoch; `total` begins with the modules imported and the cluster up.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import numpy as np
import psutil
from photos import photos

from clip_ray.cli import demo_config_path
from clip_ray.config import Config
from clip_ray.config_file import load_config
from clip_ray.embedded_s3 import storage_session
from clip_ray.storage import Storage

READERS, MICRO_BATCH, SIZE = 2, 128, 224
TAR_IMAGES = 500
WARM_SHARE = 0.2  # of the first epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"storage.embedded_dir={folder}/s3", "storage.root=s3://clip-ray-bench/x"]
        with storage_session(load_config(demo_config_path(), overrides).storage) as storage:
            store_images(storage, arguments.images, Path(folder) / "raw")
            result = compare(arguments, storage)
    print_table(result)
    if arguments.json:
        print(json.dumps(result))


def store_images(storage: Storage, count: int, raw: Path) -> None:
    """The same JPEGs as a raw folder for prepare, and as tars for webdataset."""
    (raw / "images").mkdir(parents=True)
    sizes, members = [], []
    with (raw / "pairs.jsonl").open("w") as table:
        for number, data in enumerate(photos(count)):
            (raw / "images" / f"{number:06d}.jpg").write_bytes(data)
            caption = f"Photograph number {number}, of nothing in particular ."
            row = {"image": f"{number:06d}.jpg", "caption": caption, "split": "train"}
            table.write(json.dumps(row) + "\n")
            sizes.append(len(data))
            members += [(f"{number:06d}.jpg", data), (f"{number:06d}.txt", caption.encode())]
            if len(members) == 2 * TAR_IMAGES or number == count - 1:
                storage.write_bytes(f"tars/{number // TAR_IMAGES:05d}.tar", tar(members))
                members = []
    print(f"{count} JPEGs, {statistics.mean(sizes) / 1000:.0f} KB each", file=sys.stderr)
    storage.write_json("about.json", {"raw": str(raw), "mean_bytes": statistics.mean(sizes)})


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def compare(arguments: argparse.Namespace, storage: Storage) -> dict[str, Any]:
    """Each side once in every round; medians over the rounds."""
    run_side("prepare", arguments, storage)
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "open_clip": [], "bare": []}
    for _ in range(arguments.repeats):
        for side, found in rounds.items():
            found.append(run_side(side, arguments, storage))
            print(f"{side}: {found[-1]}", file=sys.stderr, flush=True)
    median = {
        side: {field: statistics.median(one[field] for one in found) for field in found[0]}
        for side, found in rounds.items()
    }
    ours, peer, bare = median["ours"], median["open_clip"], median["bare"]
    return {
        "vs_open_clip_steady": ours["steady"] / peer["steady"],
        "vs_open_clip_total": ours["total"] / peer["total"],
        "vs_bare_steady": ours["steady"] / bare["steady"],
        "epoch_gap_s": ours["epoch_gap_s"],
        "images": arguments.images,
        "mean_bytes": storage.read_json("about.json")["mean_bytes"],
        **median,
    }


def run_side(side: str, arguments: argparse.Namespace, storage: Storage) -> dict[str, float]:
    store = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "weed"]
    before_s = sum(cpu_s(process) for process in store)
    command = [sys.executable, __file__, "--side", side, "--root", storage.root]
    command += ["--images", str(arguments.images), "--epochs", str(arguments.epochs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"store_cpu_s": sum(cpu_s(process) for process in store) - before_s}


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def bench_config(arguments: argparse.Namespace) -> Config:
    storage = Storage(arguments.root)
    return load_config(
        demo_config_path(),
        [
            f"storage.root={arguments.root}", "data.zero_shot_source=null",
            f"data.source={storage.read_json('about.json')['raw']}", "data.layout=jsonl",
            "data.shorter_side=null", f"data.cache_dir={tempfile.gettempdir()}/clip-ray-bench",
            f"model.image.size={SIZE}", f"train.global_batch={MICRO_BATCH}",
            "cluster.num_workers=1", "data.row_group_rows=16",
        ],
    )  # fmt: skip


def prepare_side(arguments: argparse.Namespace) -> dict[str, float]:
    """Ours: the raw folder to shards, through the job itself but for its check of empty splits."""
    from clip_ray.data import prepare as job
    from clip_ray.data.records import read_raw
    from clip_ray.training.launch import ray_session

    config = bench_config(arguments)
    storage = Storage(config.data_root)
    with ray_session(config):
        raw = read_raw(config.data, storage.below("staging"))
        plans = job._plans(raw.splits, config.data, first={})
        shards, quarantined = job._run(plans, config.data, storage, lambda line: None)
        job._finish(config.data, storage, raw, shards, quarantined)
    return {}


def ours_side(arguments: argparse.Namespace) -> dict[str, float]:
    import shutil

    import torch

    from clip_ray.data.shards import read_manifest
    from clip_ray.data.stream import stream_spec, training_stream
    from clip_ray.data.tokenizer import make_tokenizer
    from clip_ray.training.launch import ray_session
    from clip_ray.training.run import make_order

    config = bench_config(arguments)
    shutil.rmtree(str(config.data.cache_dir), ignore_errors=True)
    storage = Storage(config.data_root)
    manifest = read_manifest(storage)

    def batches() -> Iterator[int]:
        spec = stream_spec(
            data=config.data, storage=storage, manifest=manifest,
            tokenizer=make_tokenizer(config.model.text, ["photograph number of nothing"]),
            order=make_order(config, manifest), world_size=1,
            readers=READERS, image_size=SIZE,
        )  # fmt: skip
        steps = spec.order.steps_per_epoch * arguments.epochs
        for micro_batch in training_stream(spec, 0, range(steps)):
            yield len(torch.from_numpy(micro_batch["images"]))

    with ray_session(config):
        return measure(batches, arguments)


def open_clip_side(arguments: argparse.Namespace) -> dict[str, float]:
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    storage = Storage(arguments.root)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    urls = [
        client.generate_presigned_url(
            "get_object", Params={"Bucket": storage.bucket, "Key": f"{storage.prefix}/{key}"}
        )
        for key in storage.keys("tars/")
    ]
    args = SimpleNamespace(
        train_data=[f"pipe:curl -s -f '{url}'" for url in urls], val_data=None,
        train_num_samples=arguments.images, train_data_upsampling_factors=None,
        dataset_resampled=False, seed=0, batch_size=MICRO_BATCH, workers=READERS, world_size=1,
    )  # fmt: skip
    transform = image_transform(SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def batches() -> Iterator[int]:
        data = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
        for epoch in range(arguments.epochs):
            data.set_epoch(epoch)
            for images, _ in data.dataloader:
                yield len(images)

    return measure(batches, arguments)


def bare_side(arguments: argparse.Namespace) -> dict[str, float]:
    """Decode and crop in as many processes, from memory, with no framework: the limit."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    data = list(photos(1000))
    rounds = max(1, arguments.images * arguments.epochs // len(data) // 2)
    started = time.perf_counter()
    processes = [
        context.Process(target=decode_all, args=(data[part::READERS], rounds))
        for part in range(READERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rate = rounds * len(data) / (time.perf_counter() - started)
    return {"steady": rate, "total": rate}


def decode_all(data: list[bytes], rounds: int) -> None:
    from clip_ray.data.images import decode_prepared
    from clip_ray.data.transforms import random_resized_crop

    rng, crop = np.random.default_rng(0), ((0.9, 1.0), (0.75, 4 / 3))
    for _ in range(rounds):
        for jpeg in data:
            np.asarray(random_resized_crop(decode_prepared(jpeg), SIZE, *crop, rng))


def measure(
    batches: Callable[[], Iterator[int]], arguments: argparse.Namespace
) -> dict[str, float]:
    peak = PeakMemory()
    started = time.perf_counter()
    times_s, counts = [started], [0]
    for count in batches():
        times_s.append(time.perf_counter())
        counts.append(count)
    done = np.cumsum(counts)
    warm = int(np.searchsorted(done, WARM_SHARE * arguments.images))
    intervals = np.diff(times_s)[warm:]
    per_epoch = len(counts) // arguments.epochs
    boundaries = [
        max(np.diff(times_s)[epoch * per_epoch - 3 : epoch * per_epoch + 4])
        for epoch in range(1, arguments.epochs)
    ]
    return {
        "steady": float((done[-1] - done[warm]) / (times_s[-1] - times_s[warm])),
        "total": float(done[-1] / (times_s[-1] - started)),
        "first_batch_s": times_s[1] - started,
        "epoch_gap_s": float(max(boundaries, default=0.0) - np.median(intervals)),
        **peak.stop(),
    }


class PeakMemory:
    """The largest sum of PSS over this process and its descendants, Ray's own apart."""

    def __init__(self) -> None:
        self._peak = {"pss_ours_mib": 0.0, "pss_ray_mib": 0.0}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        self._ended.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._ended.wait(2):
            sums = dict.fromkeys(self._peak, 0.0)
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                try:
                    name = process.name() + " ".join(process.cmdline()[:1])
                    pss = process.memory_full_info().pss / 2**20
                except psutil.Error:
                    continue
                is_ray = any(word in name for word in ("raylet", "gcs_server", "ray/", "ray::IDLE"))
                sums["pss_ray_mib" if is_ray else "pss_ours_mib"] += pss
            if sum(sums.values()) > sum(self._peak.values()):
                self._peak = sums


def print_table(result: dict[str, Any]) -> None:
    fields = ("steady", "total", "first_batch_s", "store_cpu_s", "pss_ours_mib", "pss_ray_mib")
    print("side       " + "".join(f"{field:>15}" for field in fields))
    for side in ("ours", "open_clip", "bare"):
        cells = [f"{result[side][f]:15.1f}" if f in result[side] else " " * 15 for f in fields]
        print(f"{side:11}" + "".join(cells))
    for field in ("vs_open_clip_steady", "vs_open_clip_total", "vs_bare_steady", "epoch_gap_s"):
        print(f"{field:22}{result[field]:8.2f}")


SIDES = {
    "prepare": prepare_side,
    "ours": ours_side,
    "open_clip": open_clip_side,
    "bare": bare_side,
}

if __name__ == "__main__":
    main()
