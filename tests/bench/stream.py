"""The stream against open_clip's pipeline, Hugging Face datasets and the bare loop, from S3.

    python tests/bench/stream.py [--images 6000] [--epochs 3] [--repeats 3] [--json]

Each side runs in processes of its own, in turn, on the same cores, over the same JPEGs in the same
object store (the embedded one, unless AWS_ENDPOINT_URL names another), with two reader processes.
`total` begins with the modules imported and the cluster up; that time is `start_s`.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import store_cpu_s
from photos import caption, write_raw_set

from clip_ray.cli import demo_config_path
from clip_ray.config_file import load_config
from clip_ray.embedded_s3 import storage_session
from clip_ray.storage import Storage

SIDES = ("ours", "open_clip", "hf_datasets", "bare")
TAR_IMAGES = 500
SIDE_TIMEOUT_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"storage.embedded_dir={folder}/s3", "storage.root=s3://clip-ray-bench/x"]
        with storage_session(load_config(demo_config_path(), overrides).storage) as storage:
            jpegs = write_raw_set(Path(folder) / "raw", arguments.images)
            write_tars(storage, jpegs)
            options = ["--root", storage.root, "--raw", f"{folder}/raw"]
            options += ["--images", str(arguments.images), "--epochs", str(arguments.epochs)]
            result = compare(arguments.repeats, options)
    result |= {"images": arguments.images, "mean_bytes": statistics.mean(map(len, jpegs))}
    print_table(result)
    if arguments.json:
        print(json.dumps(result))


def write_tars(storage: Storage, jpegs: Sequence[bytes]) -> None:
    """webdataset's shards of the same images."""
    for start in range(0, len(jpegs), TAR_IMAGES):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for number, jpeg in enumerate(jpegs[start : start + TAR_IMAGES], start):
                for suffix, data in (("jpg", jpeg), ("txt", caption(number).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        storage.write_bytes(f"tars/{start // TAR_IMAGES:05d}.tar", buffer.getvalue())


def compare(repeats: int, options: list[str]) -> dict[str, Any]:
    """Each side once in every round; medians over the rounds."""
    run_side("prepare", options)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, found in rounds.items():
            found.append(run_side(side, options))
            print(f"{side}: {found[-1]}", file=sys.stderr, flush=True)
    median = {
        side: {field: statistics.median(one[field] for one in found) for field in found[0]}
        for side, found in rounds.items()
    }
    ours, peer = median["ours"], median["open_clip"]
    return {
        "vs_open_clip_steady": ours["steady"] / peer["steady"],
        "vs_open_clip_total": ours["total"] / peer["total"],
        "vs_hf_datasets_steady": ours["steady"] / median["hf_datasets"]["steady"],
        "vs_bare_steady": ours["steady"] / median["bare"]["steady"],
        "epoch_gap_s": ours["epoch_gap_s"],
        **median,
    }


def run_side(side: str, options: list[str]) -> dict[str, float]:
    store_before_s = store_cpu_s()
    script = Path(__file__).with_name("stream_sides.py")
    done = subprocess.run(
        [sys.executable, str(script), side, *options],
        stdout=subprocess.PIPE, text=True, check=True, timeout=SIDE_TIMEOUT_S,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"store_cpu_s": store_cpu_s() - store_before_s}


def print_table(result: dict[str, Any]) -> None:
    fields = ("steady", "total", "start_s", "first_batch_s", "epoch_gap_s", "store_cpu_s")
    fields += ("pss_ours_mib", "pss_ray_mib")
    print("side       " + "".join(f"{field:>14}" for field in fields))
    for side in SIDES:
        cells = [f"{result[side][f]:14.1f}" if f in result[side] else " " * 14 for f in fields]
        print(f"{side:11}" + "".join(cells))
    for field, value in result.items():
        if field.startswith("vs_") or field == "epoch_gap_s":
            print(f"{field:22}{value:8.2f}")


if __name__ == "__main__":
    main()
