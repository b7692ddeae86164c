"""A sweep whose driver, a worker and a node are killed ends with each trial exactly once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_site import FaultSite, fault_site
from faults import node_killed, worker_killed
from ray.cluster_utils import Cluster

from clip_ray.config_file import dump_config
from clip_ray.storage import Storage
from clip_ray.training.ledger import Entry, Ledger
from clip_ray.tuning.journal import Journal, Trial, journal_of

STEPS_PER_EPOCH = 4
OPTIONS = [
    "name=faulty", "checkpoint.every_steps=2", "checkpoint.keep_last=99",
    "cluster.num_workers=1", "cluster.cpus_per_worker=1",
    "tune.max_trials=4", "tune.concurrent=2", "tune.search=random", "tune.scheduler=none",
]  # fmt: skip
# One of two trials has ended while the other goes on.
SPACE = """
space:
  train.epochs: {grid: [3, 10]}
  optim.lr: {loguniform: [1.0e-4, 1.0e-3]}
"""


def with_dashboard() -> Cluster:
    head = {"num_cpus": 0, "object_store_memory": 200 * 2**20, "include_dashboard": True}
    return Cluster(initialize_head=True, head_node_args=head)


@pytest.mark.alone
@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_a_sweep_outlives_its_driver_a_worker_and_a_node(tmp_path: Path) -> None:
    with fault_site(tmp_path, OPTIONS, start_cluster=with_dashboard) as site:
        journal = journal_of(site.config)
        path, space = tmp_path / "faulty.yaml", tmp_path / "space.yaml"
        path.write_text(dump_config(site.config))
        space.write_text(SPACE)
        start(site, str(path), f"--space={space}")
        await_trials(site, journal, ended=1, reported=2)
        assert site.driver is not None
        os.killpg(site.driver.pid, signal.SIGKILL)
        site.driver.wait(10)
        before = {trial.number: trial for trial in journal.trials()}
        kept = {number: entries(site, trial) for number, trial in before.items()}
        assert {trial.state for trial in before.values()} == {"running", "finished"}
        assert kept[1]

        start(site, str(path), "--resume=faulty")
        await_trials(site, journal, ended=2, reported=3)
        worker_killed(site)
        await_trials(site, journal, ended=3, reported=4)
        node_killed(site)
        assert site.await_end(240) == 0, site.said()[-3000:]

        trials = journal.trials()
        assert [(trial.number, trial.state) for trial in trials] == [
            (number, "finished") for number in range(4)
        ]
        for trial in trials:
            epochs = int(trial.values["train.epochs"] or 0)
            assert [report.epoch for report in trial.reports] == list(range(1, epochs + 1))
            assert entries(site, trial)[-1].step == epochs * STEPS_PER_EPOCH
            # What had been saved is not made again, and what had ended is as it was.
            saved = kept.get(trial.number, ())
            assert entries(site, trial)[: len(saved)] == saved
            if (old := before.get(trial.number)) and old.state == "finished":
                assert trial == old
        runs = set(Storage(site.config.storage.root).folders("runs/"))
        assert runs == {trial.run for trial in trials}
        assert site.left_behind() == []


def start(site: FaultSite, *arguments: str) -> None:
    """`clip-ray tune`, as a process of its own."""
    site.driver = subprocess.Popen(
        [sys.executable, "-m", "clip_ray", "tune", *arguments],
        env=os.environ | {"RAY_ADDRESS": site.cluster.address, "AWS_ENDPOINT_URL": site.proxy.url},
        stdin=subprocess.DEVNULL,
        stdout=site.log,
        stderr=site.log,
        text=True,
        start_new_session=True,
    )


def await_trials(site: FaultSite, journal: Journal, ended: int, reported: int) -> None:
    """Waits until so many trials have ended, and so many have reported, those among them."""
    wanted: list[Callable[[list[Trial]], bool]] = [
        lambda trials: sum(trial.state != "running" for trial in trials) >= ended,
        lambda trials: sum(bool(trial.reports) for trial in trials) >= reported,
    ]
    deadline_s = time.monotonic() + 180
    while not all(holds(journal.trials()) for holds in wanted):
        assert site.driver is not None
        assert site.driver.poll() is None, site.said()[-3000:]
        assert time.monotonic() < deadline_s, site.said()[-3000:]
        time.sleep(0.2)


def entries(site: FaultSite, trial: Trial) -> tuple[Entry, ...]:
    return Ledger(Storage(f"{site.config.storage.root}/runs/{trial.run}")).read().checkpoints
