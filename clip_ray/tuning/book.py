"""A sweep's trials while it runs: what its parts share; the journal has each change at once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from clip_ray.config import Config
from clip_ray.tuning.journal import Exploit, Journal, Report, Trial
from clip_ray.tuning.results import gpu_hours
from clip_ray.tuning.space import Scalar
from clip_ray.tuning.trial import FAILED, name_of


class Book:
    """The trials by number, and the time that the sweep has taken."""

    def __init__(self, journal: Journal, config: Config) -> None:
        self.journal, self._config = journal, config
        self.trials: dict[int, Trial] = {trial.number: trial for trial in journal.trials()}
        self._hours_before = journal.sweep().hours
        self._began_s = time.monotonic()
        # Hours of a trial's earlier attempts, and of the attempt that is running.
        self._hours: dict[int, tuple[float, float]] = {
            trial.number: (trial.worker_hours, 0.0) for trial in self.trials.values()
        }

    @property
    def objective(self) -> str:
        """The figure that trials are ranked by."""
        return next(iter(self._config.tune.objectives))

    @property
    def hours(self) -> float:
        """Of the sweep, by the clock, those before it was resumed with it."""
        return self._hours_before + (time.monotonic() - self._began_s) / 3600

    @property
    def worker_hours(self) -> float:
        """Of all trials."""
        return sum(trial.worker_hours for trial in self.trials.values())

    @property
    def gpu_hours(self) -> float:
        """Of all trials."""
        return sum(gpu_hours(trial, self._config) for trial in self.trials.values())

    def spent(self) -> str | None:
        """The budget that is used up, in words; None while there is some left."""
        tune = self._config.tune
        if tune.max_hours is not None and self.hours >= tune.max_hours:
            return f"tune.max_hours ({tune.max_hours:g}) are over"
        if tune.max_gpu_hours is not None and self.gpu_hours >= tune.max_gpu_hours:
            return f"tune.max_gpu_hours ({tune.max_gpu_hours:g}) are used up"
        return None

    def hours_left(self, total: int, concurrent: int) -> float | None:
        """What the trials that have not ended will take, if they take what those before took."""
        ended = [trial for trial in self.trials.values() if trial.state != "running"]
        if not ended:
            return None
        mean_hours = sum(trial.worker_hours for trial in ended) / len(ended)
        return mean_hours * (total - len(ended)) / concurrent

    def add(self, point: int, seed: int, values: dict[str, Scalar]) -> Trial:
        """A trial that is to begin."""
        number = len(self.trials)
        run = f"{self._config.name}-{name_of(number)}"
        trial = Trial(number=number, point=point, seed=seed, values=values, run=run)
        self.trials[number] = trial
        self.journal.write(trial)
        return trial

    def report(self, number: int, result: dict[str, Any]) -> Trial:
        """An epoch's end, as the trial told it; the same epoch again takes the place of the first.

        A trial that says that it has failed has.
        """
        trial = self.trials[number]
        if FAILED in result:
            trial.state, trial.error = "failed", result[FAILED]
        else:
            self._add_report(trial, result)
        self.journal.write(trial)
        return trial

    def end(self, number: int, error: str | None = None) -> Trial:
        """A trial's end: to its last epoch, stopped before it, or with an error.

        One that is ended because the budget is used up is still running: it may be resumed.
        """
        trial = self.trials[number]
        last_epoch = trial.values.get("train.epochs", self._config.train.epochs)
        if error is not None:
            trial.state, trial.error = "failed", error
        elif trial.state == "running" and trial.epochs >= int(last_epoch or 0):
            trial.state = "finished"
        elif trial.state == "running" and self.spent() is None:
            trial.state = "stopped"
        self.journal.write(trial)
        self.save_hours()
        return trial

    def save_hours(self) -> None:
        """Writes down how long the sweep has taken."""
        sweep = self.journal.sweep()
        self.journal.write_sweep(sweep.model_copy(update={"hours": self.hours}))

    def choose(self, run: str, test_metrics: dict[str, dict[str, float]]) -> None:
        """Writes down which run was evaluated on the test split, and how well it did."""
        update = {"chosen": run, "test_metrics": test_metrics, "hours": self.hours}
        self.journal.write_sweep(self.journal.sweep().model_copy(update=update))

    def _add_report(self, trial: Trial, result: dict[str, Any]) -> None:
        figures = dict(result["figures"])
        epoch, run_h = int(result["epoch"]), figures.pop("run_s") / 3600
        before, attempt = self._hours.get(trial.number, (0.0, 0.0))
        if run_h < attempt or result["run"] != trial.run:  # its workers were started again
            before, attempt = before + attempt, 0.0
        self._hours[trial.number] = before, run_h
        if result["fork"] is not None and result["run"] != trial.run:
            values, source = dict(result["values"]), result["fork"]
            trial.exploits.append(
                Exploit(epoch=epoch - 1, source=source, run=result["run"], values=values)
            )
        trial.run, trial.values = result["run"], dict(result["values"])
        trial.start_s = result["start_s"] if trial.start_s is None else trial.start_s
        report = Report(
            epoch=epoch,
            step=int(figures.pop("step")),
            worker_hours=before + run_h,
            # What is not a number stands for nothing: the objective is then missing.
            figures={k: v for k, v in figures.items() if k != "epoch" and math.isfinite(v)},
        )
        trial.reports = [*_before(trial.reports, epoch), report]


def _before(reports: Sequence[Report], epoch: int) -> list[Report]:
    return [report for report in reports if report.epoch < epoch]
