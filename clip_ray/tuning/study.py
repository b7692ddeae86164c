"""The Optuna study of a sweep: what its points are drawn by, and what its report is made from."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from clip_ray.config import Config
from clip_ray.tuning.journal import Trial
from clip_ray.tuning.space import Distribution, Space


def make_study(config: Config, space: Space, trials: Sequence[Trial]) -> optuna.Study:
    """A study in memory that knows the points of `trials` that have an end, by their means."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points: dict[int, list[Trial]] = {}
    for trial in trials:
        points.setdefault(trial.point, []).append(trial)
    study = optuna.create_study(
        directions=["maximize" if g == "max" else "minimize" for g in _goals(config)],
        sampler=_sampler(config, len(points)),
    )
    for point in points.values():
        if all(trial.state != "running" for trial in point):
            study.add_trial(_frozen(config, space, point))
    return study


def values_of(config: Config, point: Sequence[Trial]) -> list[float] | None:
    """The objectives of a point, each the mean of its seeds; None where no seed has all."""
    found = [
        [trial.figure(name) for name in config.tune.objectives]
        for trial in point
        if trial.state != "failed"
    ]
    whole = [[value for value in values if value is not None] for values in found]
    whole = [values for values in whole if len(values) == len(config.tune.objectives)]
    return [sum(column) / len(column) for column in zip(*whole, strict=True)] or None


def _goals(config: Config) -> list[str]:
    return list(config.tune.objectives.values())


def _sampler(config: Config, drawn: int) -> BaseSampler:
    """Seeded so that a sweep that is resumed draws other points than those that it has drawn."""
    seed = config.seed + drawn
    if config.tune.search != "optuna":
        return RandomSampler(seed=seed)
    # A quarter of the points at random; trials that are still running count as bad ones.
    startup = max(2, config.tune.max_trials // 4)
    return TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def _frozen(config: Config, space: Space, point: Sequence[Trial]) -> optuna.trial.FrozenTrial:
    params, values = point[0].values, values_of(config, point)
    return optuna.trial.create_trial(
        params=params,
        distributions={name: _distribution(space.fields[name]) for name in params},
        values=values,
        state=TrialState.FAIL if values is None else TrialState.COMPLETE,
    )


def _distribution(distribution: Distribution) -> BaseDistribution:
    if distribution.kind in ("choice", "grid"):
        return CategoricalDistribution(distribution.values)
    low, high = distribution.values
    if isinstance(low, int):
        return IntDistribution(low, high, step=int(distribution.step or 1))
    log = distribution.kind == "loguniform"
    return FloatDistribution(low, high, log=log, step=distribution.step)
