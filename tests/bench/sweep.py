"""A sweep on a cluster that grows from no node to three and back: what it finds, saves and leaves.

    python tests/bench/sweep.py [--trials 12] [--epochs 12] [--seeds 3] [--images 2000] [--json]

ASHA and Optuna on the embedded data set, over temperature and learning rate. Then the best config
and the default one are each trained again, with seeds that no trial had, and compared on test.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from clip_ray.cluster.access import access
from clip_ray.cluster.local import LocalCluster, running
from clip_ray.config_file import load_config, shipped
from clip_ray.data.shapes import ShapesSpec, write_shapes
from clip_ray.embedded_s3 import storage_session
from clip_ray.tuning.journal import Sweep, Trial, journal_of, ranked

CONFIG = str(shipped("jobs/configs/shapes.yaml"))
SPACE = Path(__file__).parent.parent.parent / "tune_spaces" / "temperature_lr.yaml"
NODES, IDLE_S = 3, 15
# A trial fits a node of the local cluster, which has two CPUs. Small batches: so short a run has
# steps enough to tell configs apart, and warms up in an epoch.
FITTED = [
    "cluster.num_workers=1", "cluster.readers_per_worker=1",
    "train.global_batch=32", "optim.warmup_steps=62",
]  # fmt: skip
# Before it there is little to be seen of a trial.
GRACE = ["tune.grace_epochs=2", "tune.reduction_factor=4"]
FIRST_NEW_SEED = 1000
COMMAND_TIMEOUT_S = 5400
RECALL = "image_retrieval_recall@1"
# Ray's own, one of each for the whole cluster; they run at the head and outlive every job.
OF_THE_CLUSTER = (
    "_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsActor", "_UsageCollectionActor",
)  # fmt: skip
LEFT = """
import json, ray
from ray.util.state import list_actors
ray.init(log_to_driver=False)
groups = ray.util.placement_group_table().values()
left = [f"placement group {g['placement_group_id']}" for g in groups if g["state"] != "REMOVED"]
actors = list_actors(filters=[("state", "=", "ALIVE")], limit=9999)
left += [f"actor {a.class_name}" for a in actors]
print(json.dumps(left))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="of the train split")
    parser.add_argument("--report", type=Path, default=Path("sweep.html"), help="the page on it")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    arguments.report = arguments.report.resolve()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        result = bench(Path(name), arguments)
    for field, value in result.items():
        print(f"{field:24}{value}")
    if arguments.json:
        print(json.dumps(result))


def bench(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    spec = ShapesSpec(train=arguments.images)
    write_shapes(folder / ".clip-ray" / "raw" / "shapes", spec)
    cluster = yaml.safe_load(shipped("raycluster/local.yaml").read_text())
    cluster["idle_timeout_minutes"] = IDLE_S / 60
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    clip_ray("cluster", "start", "cluster.yaml", "--min=0", f"--max={NODES}")
    try:
        found = running()
        assert found is not None
        os.environ.update(found.environment())
        nodes = NodeCount()
        began_s = time.monotonic()
        options = [*FITTED, f"train.epochs={arguments.epochs}"]
        space = f"--space={SPACE}"
        tuned = [f"tune.concurrent={NODES}", f"tune.max_trials={arguments.trials}", *GRACE]
        clip_ray("tune", CONFIG, *options, *tuned, "name=sweep", space)
        swept_s = time.monotonic() - began_s
        at_end = nodes.await_none(IDLE_S + 120)
        emptied_s = time.monotonic() - began_s - swept_s
        left = leaked(found)
        sweep, trials = read_sweep()
        page = f"--report={arguments.report}"
        clip_ray("tune-report", "sweep", CONFIG, page, "--apply=best.yaml")
        swept = figures(sweep, trials, arguments)
        swept |= {"leaked": left, "nodes_at_end": at_end, "emptied_s": round(emptied_s)}
        print(swept, file=sys.stderr, flush=True)  # the rest takes as long again
        best = retrained("best", "best.yaml", [], arguments.seeds)
        default = retrained("default", CONFIG, options, arguments.seeds)
        return swept | {
            "best": best, "default": default,
            "best_minus_default": statistics.mean(best) - statistics.mean(default),
            "spread": spread(best, default),
            "nodes_most": nodes.most, "sweep_s": swept_s,
        }  # fmt: skip
    finally:
        clip_ray("cluster", "stop")


def clip_ray(*arguments: str) -> str:
    """The command; what it printed. Raises where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "clip_ray", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=True,
    )
    return done.stdout


class NodeCount:
    """How many nodes there are beside the head, looked at once a second."""

    def __init__(self) -> None:
        self.now = self.most = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        found = access(None)
        with contextlib.suppress(OSError):  # the cluster has ended
            while True:
                self.now = sum(not node["is_head_node"] for node in found.nodes())
                self.most = max(self.most, self.now)
                time.sleep(1)

    def await_none(self, timeout_s: float) -> int:
        """Nodes that are left after so long at most."""
        deadline_s = time.monotonic() + timeout_s
        while self.now and time.monotonic() < deadline_s:
            time.sleep(1)
        return self.now


def leaked(cluster: LocalCluster) -> list[str]:
    """Placement groups and actors that are still there, from Ray's state."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT],
        env=os.environ | cluster.environment(),
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    left: list[str] = json.loads(done.stdout.splitlines()[-1])
    return [each for each in left if not each.endswith(OF_THE_CLUSTER)]


def read_sweep() -> tuple[Sweep, list[Trial]]:
    config = load_config(CONFIG, ["name=sweep"])
    with storage_session(config.storage):
        journal = journal_of(config)
        return journal.sweep(), ranked(journal.trials(), config)


def retrained(name: str, path: str, options: list[str], seeds: int) -> list[float]:
    """Text→image R@1 on test of the config with so many new seeds."""
    recalls = []
    for seed in range(FIRST_NEW_SEED, FIRST_NEW_SEED + seeds):
        overrides = [*options, f"name={name}-{seed}", f"seed={seed}"]
        clip_ray("train", path, *overrides)
        printed = clip_ray("evaluate", path, *overrides).splitlines()
        results = json.loads([line for line in printed if line.startswith("{")][-1])
        recalls.append(round(results["zeroshot_retrieval"][RECALL], 4))
    return recalls


def figures(sweep: Sweep, trials: list[Trial], arguments: argparse.Namespace) -> dict[str, Any]:
    run = sum(trial.epochs for trial in trials)
    starts = [trial.start_s for trial in trials if trial.start_s is not None]
    return {
        "trials": len(trials),
        "states": {
            state: sum(t.state == state for t in trials) for state in {t.state for t in trials}
        },
        "epochs_run": run,
        "epochs_saved": round(1 - run / (arguments.trials * arguments.epochs), 3),
        "start_s": statistics.median(starts),
        "best_values": trials[0].values,
        "chosen_on_test": (sweep.test_metrics or {}).get("zeroshot_retrieval", {}).get(RECALL),
    }


def spread(best: list[float], default: list[float]) -> float:
    """Standard error of the difference of the means."""
    return sum(statistics.variance(side) / len(side) for side in (best, default)) ** 0.5


if __name__ == "__main__":
    main()
