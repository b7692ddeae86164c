"""Samples/s of the whole harness against open_clip's program, and against the bare engine.

    python tests/bench/step.py [--images 4000] [--rounds 5] [--gpu] [--json]

Two workers of one thread each, on the same cores, over the same photographs of 500×375 in the same
object store (the embedded one, unless AWS_ENDPOINT_URL names another). With large towers (ViT-B/32
and a BERT of CLIP's size) computing dominates, with tiny ones the data does. `--gpu` runs the
large ones with one worker on one GPU, in bf16. Every round runs each side once, in processes of its
own; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from sides import Figures, medians, run_side, stored_photos

# name: side and its options
CASES: dict[str, list[str]] = {
    "ours, large, ZeRO-0": ["ours", "--towers", "large", "--stage", "0"],
    "ours, large, ZeRO-2": ["ours", "--towers", "large", "--stage", "2"],
    "open_clip, large, DDP": ["open_clip", "--towers", "large"],
    "bare, large, ZeRO-2": ["bare", "--towers", "large", "--stage", "2"],
    "ours, tiny, ZeRO-0": ["ours", "--stage", "0"],
    "ours, tiny, ZeRO-2": ["ours", "--stage", "2"],
    "open_clip, tiny, DDP": ["open_clip"],
    "memory-fed, tiny, ZeRO-2": ["memory_fed", "--stage", "2"],
    "bare, tiny, ZeRO-2": ["bare", "--stage", "2"],
    "decode, large": ["decode", "--towers", "large"],
    "decode, tiny": ["decode"],
}
GPU_CASES: dict[str, list[str]] = {
    "ours, ZeRO-0": ["ours", "--towers", "gpu", "--stage", "0"],
    "ours, ZeRO-2": ["ours", "--towers", "gpu", "--stage", "2"],
    "open_clip": ["open_clip", "--towers", "gpu"],
    "memory-fed, ZeRO-2": ["memory_fed", "--towers", "gpu", "--stage", "2"],
    "bare, ZeRO-2": ["bare", "--towers", "gpu", "--stage", "2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with stored_photos(arguments.images) as (_, options):
        run_side("step_sides.py", ["prepare", *options])
        cases = GPU_CASES if arguments.gpu else CASES
        median = medians([one_round(cases, options) for _ in range(arguments.rounds)])
    result = (gpu_ratios(median) if arguments.gpu else ratios(median)) | median
    print_table(result, cases)
    if arguments.json:
        print(json.dumps({"rounds": arguments.rounds, **result}))


def one_round(cases: dict[str, list[str]], options: list[str]) -> dict[str, Figures]:
    found = {}
    for case, side in cases.items():
        one = run_side("step_sides.py", [*side, *options], OMP_NUM_THREADS="1")
        if "rates" in one:
            # Steps are of one size: their mean rate is that of their mean time.
            one["samples_per_s"] = statistics.harmonic_mean(one.pop("rates"))
        found[case] = one
        print(f"{case}: {one}", file=sys.stderr, flush=True)
    return found


def ratios(median: dict[str, Figures]) -> dict[str, float]:
    rate = {case: found.get("samples_per_s", 0.0) for case, found in median.items()}

    def vs_cores(towers: str) -> float:
        cases = f"bare, {towers}, ZeRO-2", f"decode, {towers}"
        needed_s = sum(median[case]["cpu_s_per_sample"] for case in cases)
        return rate[f"ours, {towers}, ZeRO-2"] * needed_s / (os.cpu_count() or 1)

    return {
        "vs_open_clip_compute": rate["ours, large, ZeRO-0"] / rate["open_clip, large, DDP"],
        "vs_open_clip_compute_zero_2": rate["ours, large, ZeRO-2"] / rate["open_clip, large, DDP"],
        "vs_open_clip_data": rate["ours, tiny, ZeRO-0"] / rate["open_clip, tiny, DDP"],
        "vs_open_clip_data_zero_2": rate["ours, tiny, ZeRO-2"] / rate["open_clip, tiny, DDP"],
        "vs_bare_memory_fed": rate["memory-fed, tiny, ZeRO-2"] / rate["bare, tiny, ZeRO-2"],
        "vs_core_bound": vs_cores("large"),
        "vs_core_bound_data": vs_cores("tiny"),
        "communication_share": median["ours, large, ZeRO-0"]["communication_share"],
        "transfer_share": median["ours, large, ZeRO-0"]["transfer_share"],
    }


def gpu_ratios(median: dict[str, Figures]) -> dict[str, float]:
    rate = {case: found["samples_per_s"] for case, found in median.items()}
    return {
        "vs_open_clip": rate["ours, ZeRO-0"] / rate["open_clip"],
        "vs_open_clip_zero_2": rate["ours, ZeRO-2"] / rate["open_clip"],
        "vs_bare_memory_fed": rate["memory-fed, ZeRO-2"] / rate["bare, ZeRO-2"],
    }


def print_table(result: dict[str, Any], cases: Iterable[str]) -> None:
    fields = (
        "samples_per_s", "communication_share", "data_wait_share", "cpu_s_per_sample", "mfu",
    )  # fmt: skip
    print(f"{'side':26}" + "".join(f"{field:>21}" for field in fields))
    for case in cases:
        cells = [f"{result[case][f]:21.3f}" if f in result[case] else " " * 21 for f in fields]
        print(f"{case:26}" + "".join(cells))
    for field, value in result.items():
        if not isinstance(value, dict):
            print(f"{field:30}{value:8.3f}")


if __name__ == "__main__":
    main()
