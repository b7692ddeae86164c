"""The stream against open_clip's pipeline, Hugging Face datasets and the bare loop, from S3.

    python tests/bench/stream.py [--images 6000] [--epochs 3] [--repeats 3] [--json]

Each side runs in processes of its own, in turn, on the same cores, over the same JPEGs in the same
object store (the embedded one, unless AWS_ENDPOINT_URL names another), with two reader processes.
`total` begins with the modules imported and the cluster up; that time is `start_s`. `bare` is a
loop over JPEGs in memory with the crop of ours; `bare_pillow` is that loop with Pillow's, as the
peers have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from measure import store_cpu_s
from sides import Figures, medians, run_side, stored_photos

SIDES = ("ours", "open_clip", "hf_datasets", "bare", "bare_pillow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with stored_photos(arguments.images) as (jpegs, options):
        options += ["--images", str(arguments.images), "--epochs", str(arguments.epochs)]
        result = compare(arguments.repeats, options)
    result |= {"images": arguments.images, "mean_bytes": statistics.mean(map(len, jpegs))}
    print_table(result)
    if arguments.json:
        print(json.dumps(result))


def compare(repeats: int, options: list[str]) -> dict[str, Any]:
    """Each side once in every round; medians over the rounds."""
    run_side("stream_sides.py", ["prepare", *options])
    median = medians([one_round(options) for _ in range(repeats)])
    ours, peer = median["ours"], median["open_clip"]
    return {
        "vs_open_clip_steady": ours["steady"] / peer["steady"],
        "vs_open_clip_total": ours["total"] / peer["total"],
        "vs_hf_datasets_steady": ours["steady"] / median["hf_datasets"]["steady"],
        "vs_bare_steady": ours["steady"] / median["bare"]["steady"],
        "vs_bare_pillow_steady": ours["steady"] / median["bare_pillow"]["steady"],
        "epoch_gap_s": ours["epoch_gap_s"],
        "mid_epoch_gap_s": ours["mid_epoch_gap_s"],
        **median,
    }


def one_round(options: list[str]) -> dict[str, Figures]:
    found = {}
    for side in SIDES:
        before_s = store_cpu_s()
        figures = run_side("stream_sides.py", [side, *options])
        found[side] = figures | {"store_cpu_s": store_cpu_s() - before_s}
        print(f"{side}: {found[side]}", file=sys.stderr, flush=True)
    return found


def print_table(result: dict[str, Any]) -> None:
    fields = ("steady", "total", "start_s", "first_batch_s", "epoch_gap_s", "store_cpu_s")
    fields += ("pss_ours_mib", "pss_ray_mib")
    print("side       " + "".join(f"{field:>14}" for field in fields))
    for side in SIDES:
        cells = [f"{result[side][f]:14.1f}" if f in result[side] else " " * 14 for f in fields]
        print(f"{side:11}" + "".join(cells))
    for field, value in result.items():
        if field.startswith("vs_") or field.endswith("epoch_gap_s"):
            print(f"{field:22}{value:8.2f}")


if __name__ == "__main__":
    main()
