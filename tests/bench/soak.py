"""One training run, faults at random: what is lost, and whether it is still the same run.

    python tests/bench/soak.py [--minutes 20] [--seed 0] [--json]

A fault counts only when a checkpoint was committed after the recovery from it. At the end the run
stops at a checkpoint, and a run without faults is trained to the same step: samples, state and
what is left behind are compared. Needs root: one of the faults mounts a full disk.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from fault_site import FaultSite, fault_site
from faults import FAULTS
from sample_log import samples

OPTIONS = [
    "train.epochs=100000", "checkpoint.every_epochs=5", "checkpoint.every_steps=10",
    "cluster.hang_timeout_s=10", "evaluation.batch=16",
]  # fmt: skip
BETWEEN_FAULTS_S = (20.0, 60.0)
# So that the run with faults has no more steps than one without can make in a few minutes.
PAUSE_S = 0.2


class Times(NamedTuple):
    """Seconds from a fault to the first new step, and to a checkpoint of a later one."""

    new_step_s: float
    checkpoint_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        fault_site(Path(folder), OPTIONS, PAUSE_S) as site,
    ):
        recoveries = meet_faults(site, arguments.minutes, random.Random(arguments.seed))
        result = compare(site, recoveries)
    for field, value in result.items():
        print(f"{field:24}{value}")
    if arguments.json:
        print(json.dumps(result))


def meet_faults(site: FaultSite, minutes: float, chance: random.Random) -> dict[str, list[Times]]:
    """What came after each fault, by kind."""
    recoveries = collections.defaultdict(list)
    site.start("soak")
    site.await_step(1)
    ends_s, due = time.monotonic() + 60 * minutes, []
    while time.monotonic() < ends_s or len(recoveries) < len(FAULTS):
        time.sleep(chance.uniform(*BETWEEN_FAULTS_S) / 2)
        due = due or chance.sample(sorted(FAULTS), len(FAULTS))
        kind = due.pop()
        began_s, before = time.monotonic(), site.last_step()
        FAULTS[kind](site)
        # Of the step after it some rank may have begun its part.
        site.await_new_step(before + 1)
        new_step_s = time.monotonic() - began_s
        site.await_step(site.last_step() + 1)
        recoveries[kind].append(Times(new_step_s, time.monotonic() - began_s))
        print(f"{kind}: {recoveries[kind][-1]}, step {before}", file=sys.stderr, flush=True)
    return recoveries


def compare(site: FaultSite, recoveries: dict[str, list[Times]]) -> dict[str, Any]:
    """Against a run that is stopped at the same step, and has met nothing."""
    site.stop()
    last = site.newest_step()
    leaked = site.left_behind()
    soaked, log = site.newest_state(), samples(site.ids("soak"))
    site.start("reference", stop_at=last, pause_s=0.0)
    site.await_end(timeout_s=3600)
    wanted = samples(site.ids("reference"))
    seen = [collections.Counter(log.get(step, [])) for step in range(last)]
    due = [collections.Counter(wanted[step]) for step in range(last)]
    reference = site.newest_state()
    return {
        "faults": sum(map(len, recoveries.values())),
        "steps": last,
        "samples_lost": sum((d - s).total() for s, d in zip(seen, due, strict=True)),
        "samples_repeated": sum((s - d).total() for s, d in zip(seen, due, strict=True)),
        "order_same": all(log.get(step) == wanted[step] for step in range(last)),
        "bit_exact": soaked.keys() == reference.keys()
        and all(torch.equal(soaked[name], reference[name]) for name in soaked),
        "leaked": leaked,
        "by_kind": {
            kind: {
                "times": len(each),
                "new_step_s": round(statistics.median(times.new_step_s for times in each), 1),
                "checkpoint_s": round(statistics.median(times.checkpoint_s for times in each), 1),
            }
            for kind, each in sorted(recoveries.items())
        },
    }


if __name__ == "__main__":
    main()
