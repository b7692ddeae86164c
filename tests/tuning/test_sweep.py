"""A sweep of real two-worker runs: ranked, kept in storage, nothing left in the cluster."""

from __future__ import annotations

import os
import time

import pytest
import ray
import yaml
from secrets_search import holders

from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.pipeline import prepare_data, session, tune_model
from clip_ray.storage import Storage
from clip_ray.tuning.space import Distribution

SPACE = {
    "optim.lr": Distribution("loguniform", (1e-5, 1e-3)),
    "loss.temperature": Distribution("uniform", (0.05, 0.1)),
}


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_sweep_ranks_its_trials_and_leaves_nothing(small_config: Config) -> None:
    said: list[str] = []
    with session(small_config, said.append, dashboard=True):
        prepare_data(small_config, said.append)
        trials = tune_model(small_config, SPACE, 3, said.append)
        assert placement_groups_left(timeout_s=60) == []
    assert [trial.error for trial in trials] == [None] * 3
    assert sorted(trials, key=lambda trial: -trial.recall) == trials
    assert len({trial.values["optim.lr"] for trial in trials}) == 3
    sweep = Storage(f"{small_config.storage.root}/sweeps/{small_config.name}")
    assert [trial["run"] for trial in sweep.read_json("results.json")] == [t.run for t in trials]
    best = parse_config(yaml.safe_load(sweep.read_bytes("best.yaml")), origin="best.yaml")
    assert best.optim.lr == trials[0].values["optim.lr"]
    assert best.loss.temperature == trials[0].values["loss.temperature"]
    runs = Storage(f"{small_config.storage.root}/runs/{trials[0].run}")
    assert runs.exists("weights/model.safetensors")
    secrets = [os.environ["AWS_SECRET_ACCESS_KEY"]]
    assert holders(secrets, Storage(small_config.storage.root)) == []
    assert any(line.startswith("run ") and "val R@1" in line for line in said)


def placement_groups_left(timeout_s: float) -> list[str]:
    deadline = time.monotonic() + timeout_s
    while True:
        table = ray.util.placement_group_table()
        left = [pg["placement_group_id"] for pg in table.values() if pg["state"] != "REMOVED"]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)
