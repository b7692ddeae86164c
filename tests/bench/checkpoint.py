"""What checkpoints cost the training: samples/s without them, and with a slow store all the time.

    python tests/bench/checkpoint.py [--rounds 3] [--steps 150] [--json]

Two workers train `shapes`. In the second run each step asks for a checkpoint, so that one is on
its way throughout, to an S3 that takes 5 MB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import override
from fault_site import FaultSite, fault_site
from sample_log import begun_s

from clip_ray.storage import Storage

NEVER = [
    "train.epochs=100000", "checkpoint.every_epochs=null", "checkpoint.every_minutes=null",
    "logging.every_steps=1000",
]  # fmt: skip
SLOW_BYTES_PER_S = 5e6
WARM_STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fault_site(Path(folder), NEVER) as site:
        rounds = [one_round(site, number, arguments.steps) for number in range(arguments.rounds)]
    result = {field: statistics.median(each[field] for each in rounds) for field in rounds[0]}
    for field, value in result.items():
        print(f"{field:28}{value:10.3f}")
    if arguments.json:
        print(json.dumps(result))


def one_round(site: FaultSite, number: int, steps: int) -> dict[str, float]:
    without = samples_per_s(site, f"without-{number}", steps)
    config = site.config
    site.config = override(config, ["checkpoint.every_steps=1"])
    site.proxy.up_bytes_per_s = SLOW_BYTES_PER_S
    slow = samples_per_s(site, f"slow-{number}", steps)
    site.proxy.up_bytes_per_s, site.config = None, config
    log = Storage(f"{config.storage.root}/runs/slow-{number}").read_bytes("metrics.jsonl")
    last: dict[str, Any] = json.loads(log.decode().splitlines()[-1])
    taken = last["checkpoints"] + 1  # the last one's own figures are not in it
    return {
        "samples_per_s": without,
        "samples_per_s_slow_store": slow,
        "slow_vs_without": slow / without,
        "checkpoints": taken,
        "stall_s_per_checkpoint": last["checkpoint_stall_s"] / taken,
        "state_mb": site.state().checkpoints[-1].size_bytes / 1e6,
    }


def samples_per_s(site: FaultSite, name: str, steps: int) -> float:
    """Between the warm-up's end and the last step, by the workers' own log."""
    site.start(name, stop_at=steps)
    assert site.await_end(timeout_s=600) == 0, site.said()[-3000:]
    times_s = begun_s(site.ids(name))
    passed_s = times_s[steps - 1] - times_s[WARM_STEPS]
    return (steps - 1 - WARM_STEPS) * site.config.train.global_batch / passed_s


if __name__ == "__main__":
    main()
