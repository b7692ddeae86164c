"""The prepare job against the bare loop of decoding, shrinking and encoding, on the same cores.

    python tests/bench/prepare.py [--images 10000] [--repeats 3] [--json]

Ours reads a raw folder and writes shards into the object store (the embedded one, unless
AWS_ENDPOINT_URL names another); the bare loop holds its JPEGs in memory and drops what it makes.
Ours begins with the modules imported and the cluster up; `ours` is its steady state, `ours_total`
counts the start of its workers too. `store_cpu_share` is what the store takes of all cores' time,
which the bare loop has for itself.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import PeakMemory, store_cpu_s
from photos import photos, write_raw_set
from PIL import Image

from clip_ray.config_file import load_config, shipped
from clip_ray.data.prepare import prepare
from clip_ray.embedded_s3 import storage_session
from clip_ray.storage import Storage
from clip_ray.training.session import ray_session

SHORTER_SIDE, QUALITY = 256, 95
BARE_IMAGES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_raw_set(Path(folder) / "raw", arguments.images)
        rounds = [one_round(folder, number, arguments) for number in range(arguments.repeats)]
    median = {field: statistics.median(one[field] for one in rounds) for field in rounds[0]}
    ratios = {
        f"prepare{part}_vs_bare": median[f"ours{part}"] / median["bare"] for part in ("", "_total")
    }
    result = ratios | median
    for field, value in result.items():
        print(f"{field:18}{value:10.2f}")
    if arguments.json:
        print(json.dumps({"images": arguments.images, **result}))


def one_round(folder: str, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    config = load_config(
        shipped("jobs/configs/shapes.yaml"),
        [
            f"storage.embedded_dir={folder}/s3", f"storage.root=s3://clip-ray-bench/{number}",
            f"data.source={folder}/raw", "data.layout=jsonl", "data.zero_shot_source=null",
            f"data.shorter_side={SHORTER_SIDE}", f"data.jpeg_quality={QUALITY}",
        ],
    )  # fmt: skip
    with storage_session(config.storage), ray_session(config):
        peak, times_s, store_before_s = PeakMemory(), [time.perf_counter()], store_cpu_s()

        def say(line: str) -> None:
            if ", train-" in line:
                times_s.append(time.perf_counter())

        prepare(config.data, Storage(config.data_root), say)
        ended_s = time.perf_counter()
        # Of all cores' time, the store that a cluster would have elsewhere.
        store = (store_cpu_s() - store_before_s) / (ended_s - times_s[0]) / (os.cpu_count() or 1)
        # Shards are of one size: the steady state is what comes after the first of each core.
        shards, first = len(times_s) - 1, os.cpu_count() or 1
        steady = arguments.images * (shards - first) / shards / (ended_s - times_s[first])
        total = arguments.images / (ended_s - times_s[0])
        found = {"ours": steady, "ours_total": total, "store_cpu_share": store, **peak.stop()}
    found["bare"] = bare(arguments.images)
    print(found, file=sys.stderr, flush=True)
    return found


def bare(images: int) -> float:
    """Images per second of as many processes as there are cores, with no framework."""
    context, cores = multiprocessing.get_context("fork"), os.cpu_count() or 1
    jpegs = list(photos(BARE_IMAGES))
    rounds = max(1, images // BARE_IMAGES)
    started = time.perf_counter()
    processes = [
        context.Process(target=shrink_all, args=(jpegs[part::cores], rounds))
        for part in range(cores)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return rounds * len(jpegs) / (time.perf_counter() - started)


def shrink_all(jpegs: list[bytes], rounds: int) -> None:
    for _ in range(rounds):
        for jpeg in jpegs:
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
            scale = SHORTER_SIDE / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            small = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
            small.save(io.BytesIO(), "JPEG", quality=QUALITY)


if __name__ == "__main__":
    main()
