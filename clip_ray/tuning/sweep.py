"""A sweep: Ray Tune over training runs, weak ones stopped early by ASHA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from clip_ray.config import Config
from clip_ray.config_file import dump_config, parse_config
from clip_ray.errors import RunError
from clip_ray.storage import Storage, arrow_filesystem
from clip_ray.training.launch import train
from clip_ray.training.ledger import BEST_METRIC
from clip_ray.tuning.space import Distribution, Space, with_values

# A trial's driver waits for its workers; its share of a CPU only makes Tune place it.
DRIVER_CPUS = 0.01
READER_CPUS = 1


@dataclass(frozen=True)
class Trial:
    """What became of one point of the space."""

    run: str
    values: dict[str, Any]
    epochs: int
    recall: float
    error: str | None


def run_sweep(config: Config, space: Space, trials: int, say: Callable[[str], None]) -> list[Trial]:
    """Trains `trials` points of `space`; the best first, by R@1 on the val split.

    Results and the best config are written to `sweeps/NAME`. Each trial is a run of its own, named
    after the sweep. Needs a Ray session and prepared data. Raises RunError where all trials fail.
    """
    place = Storage(config.storage.root).below(f"sweeps/{config.name}")
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(
            partial(_drive, config=config.model_dump(mode="json")), {"CPU": DRIVER_CPUS}
        ),
        param_space={},
        tune_config=ray.tune.TuneConfig(
            search_alg=OptunaSearch(
                {dotted: _domain(distribution) for dotted, distribution in space.items()},
                metric=BEST_METRIC,
                mode="max",
                seed=config.seed,
            ),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                metric=BEST_METRIC,
                mode="max",
                max_t=config.train.epochs,
                reduction_factor=2,
            ),
            num_samples=trials,
            max_concurrent_trials=_concurrent_trials(config),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name="ray",
            storage_path=place.arrow_path("").rstrip("/"),
            storage_filesystem=arrow_filesystem(),
            callbacks=[_Teller(say)],
            verbose=0,
        ),
    )
    results = tuner.fit()
    found = [_trial(config, result) for result in results]
    found.sort(key=lambda trial: (trial.error is not None, -trial.recall))
    place.write_json("results.json", [asdict(trial) for trial in found])
    if found[0].error is not None:
        raise RunError(f"every trial failed; {found[0].run}: {found[0].error}")
    best = with_values(config, found[0].values)
    place.write_bytes("best.yaml", dump_config(best).encode())
    return found


def table(trials: list[Trial]) -> list[str]:
    """The trials as lines of text."""
    fields = list(trials[0].values)
    lines = [["run", "epochs", "val R@1", *fields]]
    for trial in trials:
        recall = "failed" if trial.error else f"{trial.recall:.1%}"
        values = [f"{value:.4g}" if isinstance(value, float) else str(value)
                  for value in trial.values.values()]  # fmt: skip
        lines.append([trial.run, str(trial.epochs), recall, *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _drive(values: dict[str, Any], config: dict[str, Any]) -> None:
    """One trial: the driver of a training run whose reports go to Tune."""
    base = parse_config(config, origin="the sweep's config")
    trial = with_values(base, {"name": _run_name(base, ray.tune.get_context().get_trial_id())})
    train(with_values(trial, values), print, callbacks=[TuneReportCallback()])


def _run_name(config: Config, trial_id: str | None) -> str:
    return f"{config.name}-{trial_id}"


def _trial(config: Config, result: ray.tune.Result) -> Trial:
    metrics = result.metrics or {}
    return Trial(
        run=_run_name(config, metrics.get("trial_id")),
        values=dict(result.config or {}),
        epochs=int(metrics.get("epoch", 0)),
        recall=float(metrics.get(BEST_METRIC, 0.0)),
        error=str(result.error).strip().splitlines()[-1] if result.error else None,
    )


def _domain(distribution: Distribution) -> Any:
    if distribution.kind == "choice":
        return ray.tune.choice(list(distribution.values))
    make = ray.tune.uniform if distribution.kind == "uniform" else ray.tune.loguniform
    return make(*distribution.values)


def _concurrent_trials(config: Config) -> int:
    """How many trials fit into the cluster together, at least one."""
    cluster = config.cluster
    resources = ray.cluster_resources()
    readers_cpus = READER_CPUS * cluster.readers_per_worker
    cpus = cluster.num_workers * (cluster.cpus_per_worker + readers_cpus)
    fits = resources.get("CPU", 0) // cpus
    if cluster.gpus_per_worker:
        gpus = cluster.num_workers * cluster.gpus_per_worker
        fits = min(fits, resources.get("GPU", 0) // gpus)
    return max(1, int(fits))


class _Teller(ray.tune.Callback):
    """Says each trial's epochs as they end."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
    ) -> None:
        recall = result.get(BEST_METRIC, 0.0)
        self._say(f"tune: {trial.trial_id}: epoch {result.get('epoch')}, val R@1 {recall:.1%}")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._say(f"tune: {trial.trial_id}: failed")
