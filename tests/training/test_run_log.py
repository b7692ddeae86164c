"""The logs beside metrics.jsonl, each written by its own package and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import override

from clip_ray.config import Config
from clip_ray.errors import ConfigError
from clip_ray.training import run_log
from clip_ray.training.run_log import check_run_logs, open_run_logs


@pytest.mark.s3
def test_mlflow_has_one_run_for_all_attempts(small_config: Config, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = override(small_config, [f"logging.mlflow_uri={uri}", "logging.tensorboard=false"])
    for step in (1, 2):
        (log,) = open_run_logs(config, step - 1)
        log.write(step, {"loss": 1 / step, "image_retrieval_recall@1": 0.5})
        log.close()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("clip-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == config.name
    assert run.data.params["train.global_batch"] == "32"
    assert run.data.metrics["image_retrieval_recall_at_1"] == 0.5
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]


@pytest.mark.s3
def test_wandb_takes_the_run_without_a_network(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = override(small_config, ["logging.wandb_project=clips", "logging.tensorboard=false"])
    (log,) = open_run_logs(config, 0)
    log.write(1, {"loss": 1.5})
    log.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert config.name in written.name
    assert written.stat().st_size > 0


def test_a_log_whose_package_is_missing_is_refused(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log.importlib.util, "find_spec", lambda name: None)
    config = override(small_config, ["logging.wandb_project=clips", "logging.tensorboard=false"])
    with pytest.raises(ConfigError, match=r"wandb_project is 'clips': needs the package wandb"):
        check_run_logs(config.logging)
