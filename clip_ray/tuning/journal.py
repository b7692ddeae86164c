"""What a sweep has done, in storage: the one record that it is resumed from and reported by.

Ray Tune's own state is pickled, and is never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import mean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.errors import RunError
from clip_ray.storage import Storage
from clip_ray.tuning.space import Scalar, Space
from clip_ray.tuning.space_file import parse_space

SWEEP = "sweep.json"
_READERS = 16
# What a sweep may be resumed with another value of.
MAY_GROW = ("max_trials", "max_hours", "max_gpu_hours", "concurrent")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Report(_Record):
    """An epoch's end: its figures, and the hours that the workers have run for the trial so far."""

    epoch: int
    step: int
    worker_hours: float
    figures: dict[str, float]


class Exploit(_Record):
    """Where a trial of pbt went on from another: that one's state, with these values."""

    epoch: int
    source: str  # RUN@STEP
    run: str  # which goes on from it
    values: dict[str, Scalar]


class Trial(_Record):
    """One point with one seed: a training run, or several where it went on from others.

    running: it is, or its sweep ended before it did. finished: to its last epoch. stopped: early,
    by the scheduler. failed: more often than cluster.max_failures, with `error`.
    """

    number: int
    point: int
    seed: int
    values: dict[str, Scalar]
    run: str  # the newest of its runs
    state: Literal["running", "finished", "stopped", "failed"] = "running"
    error: str | None = None
    start_s: float | None = None  # from the trial's start to its first step
    reports: list[Report] = Field(default=[])
    exploits: list[Exploit] = Field(default=[])

    @property
    def epochs(self) -> int:
        """Epochs that it has been trained for."""
        return self.reports[-1].epoch if self.reports else 0

    @property
    def worker_hours(self) -> float:
        """Hours that its workers have run: the clock's, whatever their number."""
        return self.reports[-1].worker_hours if self.reports else 0.0

    def figure(self, name: str) -> float | None:
        """The last report's; None where there is none."""
        if not self.reports:
            return None
        last = self.reports[-1]
        return (last.figures | {"worker_hours": last.worker_hours}).get(name)


class Sweep(_Record):
    """What a sweep is made of, as it was begun; the hours that it has taken by now."""

    config: dict[str, Any]
    space: dict[str, Any]
    hours: float = 0.0
    chosen: str | None = None  # the run that was evaluated on the test split
    test_metrics: dict[str, dict[str, float]] | None = None


class Journal:
    """The record at `sweeps/NAME` of a storage: written by the sweep's driver alone."""

    def __init__(self, place: Storage) -> None:
        self.place = place

    def exists(self) -> bool:
        """Whether there is such a sweep."""
        return self.place.exists(SWEEP)

    def sweep(self) -> Sweep:
        """Raises RunError where there is none."""
        if not self.exists():
            raise RunError(f"{self.place.root}: holds no sweep; clip-ray tune begins one")
        return Sweep.model_validate_json(self.place.read_bytes(SWEEP))

    def check_begins_or_is(self, sweep: Sweep) -> None:
        """Raises RunError where there is another sweep of this name."""
        if self.exists() and _what_counts(self.sweep()) != _what_counts(sweep):
            raise RunError(
                f"{self.place.root}: is there already, with another config or space: --resume goes "
                "on with it as it was begun; take another `name` for a new one"
            )

    def write_sweep(self, sweep: Sweep) -> None:
        """Puts it in the place of the last."""
        self.place.write_bytes(SWEEP, sweep.model_dump_json(indent=1).encode())

    def trials(self) -> list[Trial]:
        """All of them, by number."""
        with ThreadPoolExecutor(_READERS) as readers:
            texts = readers.map(self.place.read_bytes, self.place.keys("trials/"))
            found = [Trial.model_validate_json(text) for text in texts]
        return sorted(found, key=lambda trial: trial.number)

    def write(self, trial: Trial) -> None:
        """Puts a trial in the place of its last record."""
        key = f"trials/{trial.number:05d}.json"
        self.place.write_bytes(key, trial.model_dump_json(indent=1).encode())


def _what_counts(sweep: Sweep) -> Any:
    """What two commands have in common that mean the same sweep: all but what it may cost."""
    tune = {k: v for k, v in sweep.config["tune"].items() if k not in MAY_GROW}
    return sweep.config | {"tune": tune}, sweep.space


def journal_of(config: Config, name: str | None = None) -> Journal:
    """That of a sweep in the config's storage, by default its own; or of s3://…/sweeps/NAME."""
    name = name or config.name
    root = name if name.startswith("s3://") else f"{config.storage.root}/sweeps/{name}"
    return Journal(Storage(root))


def parse_sweep(sweep: Sweep, overrides: Mapping[str, Any]) -> tuple[Space, Config]:
    """The space and the config of a sweep, with other values of some fields of `tune`.

    Raises ConfigError.
    """
    tree = sweep.config | {"tune": sweep.config["tune"] | dict(overrides)}
    config = parse_config(tree, origin="the sweep's config")
    return parse_space(sweep.space, config, origin="the sweep's space")


def ranked(trials: Sequence[Trial], config: Config) -> list[Trial]:
    """The best first, by the first objective; what was trained to its end before what was not.

    Points with several seeds stand by the mean of theirs, in one place.
    """
    objective, goal = next(iter(config.tune.objectives.items()))
    sign = 1 if goal == "max" else -1
    points: dict[int, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        points.setdefault(trial.point, []).append(trial)

    def place(of_point: list[Trial]) -> tuple[bool, float, int]:
        found = [t.figure(objective) for t in of_point if t.state != "failed"]
        values = [sign * value for value in found if value is not None]
        ended = any(trial.state == "finished" for trial in of_point)
        return not ended, -mean(values) if values else math.inf, of_point[0].number

    return [trial for of_point in sorted(points.values(), key=place) for trial in of_point]
