"""Where a run's figures go beside metrics.jsonl: TensorBoard, MLflow, Weights & Biases."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from clip_ray.config import Config, LoggingConfig
from clip_ray.errors import ConfigError
from clip_ray.storage import Storage

TENSORBOARD_PREFIX = "tensorboard/"
UPLOAD_INTERVAL_S = 60
_PACKAGES = {"tensorboard": "tensorboardX", "mlflow_uri": "mlflow", "wandb_project": "wandb"}
MLFLOW_RUN_KEY = "mlflow.json"


class RunLog(Protocol):
    """A place that takes the figures of logged steps. Used on rank 0 alone."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes one logged step."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


def check_run_logs(config: LoggingConfig) -> None:
    """Raises ConfigError where a package that the config needs is not installed."""
    for field, package in _PACKAGES.items():
        if getattr(config, field) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{field} is {getattr(config, field)!r}: needs the package {package}; "
                f"pip install {package}, or set it to "
                f"{'false' if field == 'tensorboard' else 'null'}"
            )


def open_run_logs(config: Config, start_step: int) -> list[RunLog]:
    """The logs that the config asks for, going on at `start_step`."""
    run, logging, logs = Storage(config.run_root), config.logging, list[RunLog]()
    if logging.tensorboard:
        logs.append(_TensorBoard(run, start_step))
    if logging.mlflow_uri:
        logs.append(_MLflow(run, config, logging.mlflow_uri))
    if logging.wandb_project:
        logs.append(_Wandb(config, logging.wandb_project))
    return logs


class _TensorBoard:
    """Event files, written here and copied to the run's folder once a minute, by a thread.

    A store that is away does not hold the training up: what it missed is in the next copy.
    """

    def __init__(self, run: Storage, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._run, self._uploaded_s = run, time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._copying: Future[None] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="clip-ray-tensorboard-")
        # What an attempt that was cut wrote after its last checkpoint is not shown.
        self._writer = SummaryWriter(self._folder.name, purge_step=start_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in _named(figures).items():
            self._writer.add_scalar(name, value, step)
        late = time.monotonic() - self._uploaded_s >= UPLOAD_INTERVAL_S
        if late and (self._copying is None or self._copying.done()):
            self._uploaded_s = time.monotonic()
            self._writer.flush()
            self._copying = self._pool.submit(self._copy)

    def close(self) -> None:
        self._pool.shutdown()
        self._writer.close()
        self._copy()
        self._folder.cleanup()

    def _copy(self) -> None:
        for path in Path(self._folder.name).iterdir():
            self._run.write_bytes(TENSORBOARD_PREFIX + path.name, path.read_bytes())


class _MLflow:
    """One MLflow run, the same for all attempts."""

    def __init__(self, run: Storage, config: Config, uri: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("clip-ray")
        if run.exists(MLFLOW_RUN_KEY):
            mlflow.start_run(run_id=run.read_json(MLFLOW_RUN_KEY)["run_id"])
            return
        active = mlflow.start_run(run_name=config.name)
        run.write_json(MLFLOW_RUN_KEY, {"run_id": active.info.run_id})
        mlflow.log_params(_flat(config.model_dump(mode="json", exclude={"tune"})))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        # In the background: a server that is away must not end the run.
        self._mlflow.log_metrics(_named(figures), step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


class _Wandb:
    """One W&B run, the same for all attempts."""

    def __init__(self, config: Config, project: str) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            id=config.name,
            name=config.name,
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _named(figures: Mapping[str, float]) -> dict[str, float]:
    """TensorBoard's and MLflow's names have no @."""
    return {name.replace("@", "_at_"): value for name, value in figures.items()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat
