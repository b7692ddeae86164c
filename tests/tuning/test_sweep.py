"""A sweep of real two-worker runs: ranked, kept in storage, nothing left in the cluster."""

from __future__ import annotations

import os

import pytest
import yaml
from conftest import override
from secrets_search import holders
from sweeps import placement_groups_left, run_sweep

from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.pipeline import prepare_data, session
from clip_ray.storage import Storage

SPACE = """
optim.lr: {loguniform: [1.0e-5, 1.0e-3]}
loss.temperature: {uniform: [0.05, 0.1]}
"""


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_sweep_ranks_its_trials_and_leaves_nothing(small_config: Config) -> None:
    said: list[str] = []
    config = override(small_config, ["tune.max_trials=3", "optim.warmup_steps=5"])
    with session(config, said.append, dashboard=True):
        prepare_data(config, said.append)
        journal, trials = run_sweep(config, SPACE, said.append)
        assert placement_groups_left(timeout_s=60) == []
    assert journal.trials() == sorted(trials, key=lambda trial: trial.number)
    assert {trial.state for trial in trials} <= {"finished", "stopped"}
    best = trials[0]
    assert best.state == "finished"
    assert len({trial.values["optim.lr"] for trial in trials}) == 3
    chosen = parse_config(yaml.safe_load(journal.place.read_bytes("best.yaml")), origin="best.yaml")
    assert chosen.optim.lr == best.values["optim.lr"]
    assert chosen.loss.temperature == best.values["loss.temperature"]
    run = Storage(f"{config.storage.root}/runs/{best.run}")
    assert run.exists("weights/model.safetensors")
    sweep = journal.sweep()
    assert sweep.chosen == best.run
    assert sweep.test_metrics is not None
    assert "image_retrieval_recall@1" in sweep.test_metrics["zeroshot_retrieval"]
    evaluated = [name for name in Storage(config.storage.root).keys("runs/") if "/results/" in name]
    assert {name.split("/")[1] for name in evaluated} == {best.run}  # the test split, once
    assert all(trial.start_s is not None and 0 < trial.start_s < 120 for trial in trials)
    secrets = [os.environ["AWS_SECRET_ACCESS_KEY"]]
    assert holders(secrets, Storage(config.storage.root)) == []
    assert (
        "tune: tune.grace_epochs is 1: trials may be stopped after 4 steps, in their warm-up "
        "(optim.warmup_steps is 5); take 2 or more"
    ) in said
    assert any(line.startswith("run ") and "image_retrieval_recall@1" in line for line in said)
