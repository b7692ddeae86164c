"""Population based training: the worse trial goes on from the better one's weights."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import override
from sweeps import run_sweep
from torch import Tensor

from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.pipeline import prepare_data, session
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints
from clip_ray.training.ledger import Ledger

STATE = ("param", "exp_avg", "exp_avg_sq")
BOUNDS = {"optim.lr": (1e-4, 1e-2), "loss.temperature": (0.05, 0.1)}
SPACE = """
optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
loss.temperature: {uniform: [0.05, 0.1]}
"""
# So many epochs that both trials are there together for long, whichever begins first.
OPTIONS = [
    "name=pbt", "train.epochs=12", "checkpoint.keep_last=12", "cluster.num_workers=1",
    "tune.max_trials=2", "tune.scheduler=pbt", "tune.search=random",
    "tune.quantile=0.5", "tune.concurrent=2", "tune.perturb_epochs=3",
]  # fmt: skip


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_an_exploited_trial_goes_on_from_the_others_weights(small_config: Config) -> None:
    config = override(small_config, OPTIONS)
    with session(config, print, dashboard=True):
        prepare_data(config, print)
        _, trials = run_sweep(config, SPACE, print)
    assert [trial.state for trial in trials] == ["finished"] * 2
    exploits = [(trial, exploit) for trial in trials for exploit in trial.exploits]
    assert exploits
    for trial in trials:
        run = Storage(f"{config.storage.root}/runs/{trial.run}")
        assert trial.exploits or Ledger(run).read().attempt == 1  # it made way for no other one
    for trial, exploit in exploits:
        source, step = exploit.source.split("@")
        assert exploit.run.startswith(f"pbt-{trial.number:04d}.")
        assert not source.startswith(f"pbt-{trial.number:04d}")
        for name, (low, high) in BOUNDS.items():
            assert low <= float(exploit.values[name] or 0) <= high
        run = Storage(f"{config.storage.root}/runs/{exploit.run}")
        trained = parse_config(yaml.safe_load(run.read_bytes("config.yaml")), origin="run")
        assert trained.optim.lr == exploit.values["optim.lr"]
        assert trained.loss.temperature == exploit.values["loss.temperature"]
        ours = tensors_at(config, exploit.run, int(step))
        theirs = tensors_at(config, source, int(step))
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {f"{kind}/logit_scale" for kind in STATE}:
            assert torch.equal(ours[name], theirs[name]), name
        scale = ours["param/logit_scale"].exp().item()
        assert scale == pytest.approx(1 / trained.loss.temperature)


def tensors_at(config: Config, run: str, step: int) -> dict[str, Tensor]:
    checkpoints = Checkpoints(Storage(f"{config.storage.root}/runs/{run}"))
    (entry,) = [entry for entry in checkpoints.list() if entry.step == step]
    return checkpoints.read(entry).tensors
