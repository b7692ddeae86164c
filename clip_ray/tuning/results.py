"""The trials of a sweep as a table, for other programs: CSV or Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from clip_ray.config import Config
from clip_ray.errors import ConfigError
from clip_ray.tuning.journal import Trial
from clip_ray.tuning.space import Scalar

_SUFFIXES = (".csv", ".parquet")
_COLUMNS = {
    "number": pa.int64(),
    "point": pa.int64(),
    "seed": pa.int64(),
    "run": pa.string(),
    "state": pa.string(),
    "error": pa.string(),
    "start_s": pa.float64(),
    "epochs": pa.int64(),
    "worker_hours": pa.float64(),
    "gpu_hours": pa.float64(),
}


def results_table(trials: Sequence[Trial], config: Config) -> pa.Table:
    """One row for each trial, in their order.

    `config/FIELD` is a value of the trial's point: null where the point has no such field, or has
    null for it. `figure/NAME` is of the trial's last report. A field with values of several types
    becomes words.
    """
    columns: dict[str, Any] = {
        name: pa.array([_base(trial, config)[name] for trial in trials], kind)
        for name, kind in _COLUMNS.items()
    }
    values = [trial.values for trial in trials]
    for field in _names(values):
        columns[f"config/{field}"] = _column([of_trial.get(field) for of_trial in values])
    figures = [trial.reports[-1].figures if trial.reports else {} for trial in trials]
    for name in _names(figures):
        found = [of_trial.get(name) for of_trial in figures]
        columns[f"figure/{name}"] = pa.array(found, pa.float64())
    return pa.table(columns)


def write_results(path: Path, table: pa.Table) -> None:
    """CSV or Parquet, as the suffix says. Raises ConfigError on any other."""
    check_results(path)
    if path.suffix.lower() == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)


def check_results(path: Path) -> None:
    """Whether `write_results` can take the path, before a sweep that ends with it.

    Raises ConfigError.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--results is {str(path)!r}: must end in {' or '.join(_SUFFIXES)}")


def gpu_hours(trial: Trial, config: Config) -> float:
    """Hours times the GPUs that the trial's workers reserve; a sweep may vary how many."""
    workers = trial.values.get("cluster.num_workers", config.cluster.num_workers)
    gpus = trial.values.get("cluster.gpus_per_worker", config.cluster.gpus_per_worker)
    return trial.worker_hours * float(workers or 0) * float(gpus or 0)


def _base(trial: Trial, config: Config) -> dict[str, Any]:
    return {
        "number": trial.number,
        "point": trial.point,
        "seed": trial.seed,
        "run": trial.run,
        "state": trial.state,
        "error": trial.error,
        "start_s": trial.start_s,
        "epochs": trial.epochs,
        "worker_hours": trial.worker_hours,
        "gpu_hours": gpu_hours(trial, config),
    }


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """All keys, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _column(values: Sequence[Scalar]) -> Any:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array(values, pa.float64())
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    # A field that is null everywhere has a type too, so that the files of two sweeps fit together.
    return pa.array(values, None if kinds else pa.string())
