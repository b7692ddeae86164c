"""What a sweep's report says in words and numbers: the best point, what was saved, what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from clip_ray.config import Config
from clip_ray.tuning.journal import Trial, ranked
from clip_ray.tuning.results import gpu_hours
from clip_ray.tuning.space import Scalar

NONE = "–"


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds of a point."""

    name: str
    goal: str
    mean: float
    deviation: float | None  # of a sample; None of a single seed
    seeds: int


@dataclass(frozen=True)
class Saving:
    """A trial that was stopped early, and what its other epochs would have cost."""

    trial: Trial
    epochs: int
    worker_hours: float


@dataclass(frozen=True)
class Cost:
    """What some trials took together."""

    worker_hours: float
    gpu_hours: float
    start_s: float | None  # the median


def finite(trial: Trial) -> Trial:
    """The trial without figures that are no numbers: a loss that is inf says nothing of a rank."""
    reports = [
        report.model_copy(
            update={"figures": {k: v for k, v in report.figures.items() if math.isfinite(v)}}
        )
        for report in trial.reports
    ]
    return trial.model_copy(update={"reports": reports})


def points_of(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials by point, in the order in which the points first appear."""
    points: dict[int, list[Trial]] = {}
    for trial in trials:
        points.setdefault(trial.point, []).append(trial)
    return list(points.values())


def best_points(trials: Sequence[Trial], config: Config) -> list[list[Trial]]:
    """The points that have the first objective, the best first; of each the trials that have it."""
    objective = first_objective(config)
    found = [
        trial
        for trial in ranked(trials, config)
        if trial.state != "failed" and trial.figure(objective) is not None
    ]
    return points_of(found)


def first_objective(config: Config) -> str:
    """The figure that trials are ranked by."""
    return next(iter(config.tune.objectives))


def spreads(point: Sequence[Trial], config: Config) -> list[Spread]:
    """Each objective that the point has."""
    found = []
    for name, goal in config.tune.objectives.items():
        values = [value for trial in point if (value := trial.figure(name)) is not None]
        if values:
            deviation = stdev(values) if len(values) > 1 else None
            found.append(Spread(name, goal, mean(values), deviation, len(values)))
    return found


def savings(trials: Sequence[Trial], config: Config) -> list[Saving]:
    """The trials that were stopped early; their hours by their own hours per epoch."""
    found = []
    for trial in trials:
        if trial.state == "stopped":
            left = planned_epochs(trial, config) - trial.epochs
            hours = trial.worker_hours / trial.epochs * left if trial.epochs else 0.0
            found.append(Saving(trial, left, hours))
    return found


def saved_share(trials: Sequence[Trial], config: Config) -> float | None:
    """Share of the planned epochs that stopping early has saved, of the trials that ended so.

    A trial that failed or still runs has saved nothing by the epochs that it lacks.
    """
    ended = [trial for trial in trials if trial.state in ("finished", "stopped")]
    planned = sum(planned_epochs(trial, config) for trial in ended)
    return 1 - sum(trial.epochs for trial in ended) / planned if planned else None


def planned_epochs(trial: Trial, config: Config) -> int:
    """Epochs of the whole trial; a sweep may vary them."""
    return int(trial.values.get("train.epochs") or config.train.epochs)


def cost(trials: Sequence[Trial], config: Config) -> Cost:
    """The hours of all, and the median of their starts."""
    starts = [trial.start_s for trial in trials if trial.start_s is not None]
    return Cost(
        worker_hours=sum(trial.worker_hours for trial in trials),
        gpu_hours=sum(gpu_hours(trial, config) for trial in trials),
        start_s=median(starts) if starts else None,
    )


def number(value: Scalar) -> str:
    """A value as one reads it: four significant digits, a config's true, false and null."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}".replace("e+", "e")
    return f"{value:.4g}".replace("e-0", "e-")


def duration(hours: float | None) -> str:
    """Hours, minutes or seconds, by how long it is."""
    if hours is None:
        return NONE
    if hours >= 1 or not hours:
        return f"{number(hours)} h"
    minutes = hours * 60
    return f"{minutes:.3g} min" if minutes >= 1 else f"{minutes * 60:.3g} s"


def counted(count: int, noun: str) -> str:
    """How many of them."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
