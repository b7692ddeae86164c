"""A sweep: Ray Tune over training runs, each a trial; begun, or gone on with from its journal."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import ray.tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import TrialScheduler

from clip_ray.config import Config
from clip_ray.config_file import dump_config
from clip_ray.data.shards import read_manifest
from clip_ray.data.stream import READER_CPUS
from clip_ray.errors import RunError
from clip_ray.evaluation.evaluate import evaluate
from clip_ray.storage import Storage, arrow_filesystem
from clip_ray.training.ledger import Ledger, lease
from clip_ray.training.run import make_order
from clip_ray.tuning.book import Book
from clip_ray.tuning.journal import Journal, Sweep, Trial, ranked
from clip_ray.tuning.points import Points
from clip_ray.tuning.schedulers import make_scheduler, replay, replay_reports
from clip_ray.tuning.screen import screen
from clip_ray.tuning.space import Space, with_values
from clip_ray.tuning.trial import drive, task_of

# A trial's driver waits for its workers; its share of a CPU only makes Tune place it.
DRIVER_CPUS = 0.01
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal has all that there is to see
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints tables, whatever `verbose` says
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that has failed reports no figures
}
Say = Callable[[str], None]


def run_sweep(
    journal: Journal, sweep: Sweep, config: Config, space: Space, say: Say
) -> list[Trial]:
    """Trains the points of `space` that are left to be trained; all trials, the best first.

    `sweep` is what a new one begins with. Each trial is a run of its own, named after the sweep.
    At the end the best config is written to `best.yaml`, and its run evaluated on the test split.
    Needs a Ray session and prepared data. Raises RunError where another driver is at it, or where
    all trials fail, and KeyboardInterrupt where it was interrupted.
    """
    lost: list[str] = []
    with lease(Ledger(journal.place), say, lambda: lost.append("its lease was lost")):
        if not journal.exists():
            journal.write_sweep(sweep)
        book = Book(journal, config)
        _tune(journal, config, space, book, lost, say)
        found = ranked(list(book.trials.values()), config)
        _check_end(book, found, lost, say)
        best = with_values(config, found[0].values)
        journal.place.write_bytes("best.yaml", dump_config(best).encode())
        if all(trial.state != "running" for trial in found):
            _evaluate_chosen(book, journal.sweep(), config, found[0], say)
    return found


def _check_end(book: Book, found: list[Trial], lost: list[str], say: Say) -> None:
    """Raises what stands against a best trial."""
    spent = book.spent()
    if lost:
        raise RunError(f"this driver stops: {lost[0]}, and another one goes on")
    if spent is not None:
        say(f"tune: ends: {spent}; clip-ray tune --resume goes on with it")
    elif any(trial.state == "running" for trial in found):
        raise KeyboardInterrupt  # Tune has taken it for itself
    if all(trial.state == "failed" or not trial.reports for trial in found):
        errors = [f"; {trial.run}: {trial.error}" for trial in found if trial.error]
        raise RunError(f"no trial is there to choose{''.join(errors[:1])}")


def _tune(
    journal: Journal, config: Config, space: Space, book: Book, lost: list[str], say: Say
) -> None:
    points, concurrent = Points(config, space, book), _concurrent(config)
    scheduler = make_scheduler(config, space, all_at_once=concurrent >= points.total)
    ended = [trial for trial in book.trials.values() if trial.state != "running"]
    replay(scheduler, ended)
    left = points.total - len(ended)
    say(f"tune: {left} trials to run, {len(ended)} have ended; {concurrent} at a time")
    if left == 0:
        return
    _say_early_ends(config, say)
    os.environ.update(ENVIRONMENT)
    pbt = config.tune.scheduler == "pbt"  # which wants no searcher, but its whole population
    task = ray.tune.grid_search([task_of(t)["trial"] for t in points.trials()]) if pbt else None
    keeper = _Keeper(book, scheduler, partial(book.hours_left, points.total, concurrent), say)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(
            partial(drive, base=config.model_dump(mode="json")), {"CPU": DRIVER_CPUS}
        ),
        param_space={"trial": task} if pbt else {},
        tune_config=ray.tune.TuneConfig(
            search_alg=None if pbt else points,
            scheduler=scheduler,
            num_samples=1 if pbt else left,
            max_concurrent_trials=concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=ray.tune.RunConfig(
            name=f"ray-{len(list(journal.place.folders('')))}",
            storage_path=journal.place.arrow_path("").rstrip("/"),
            storage_filesystem=arrow_filesystem(),
            failure_config=ray.tune.FailureConfig(max_failures=config.cluster.max_failures),
            stop=_Ends(book, lost),
            callbacks=[keeper, JsonLoggerCallback()],  # without a result, Tune complains
            verbose=0,
        ),
    )
    with screen(book, config):
        tuner.fit()


def _say_early_ends(config: Config, say: Say) -> None:
    """Says where trials are judged in their warm-up, when they have little to show."""
    tune, warmup_steps = config.tune, config.optim.warmup_steps
    steps_per_epoch = make_order(config, read_manifest(Storage(config.data_root))).steps_per_epoch
    grace_steps = tune.grace_epochs * steps_per_epoch
    if tune.scheduler in ("asha", "median") and 0 < grace_steps < warmup_steps:
        say(
            f"tune: tune.grace_epochs is {tune.grace_epochs}: trials may be stopped after "
            f"{grace_steps} steps, in their warm-up (optim.warmup_steps is {warmup_steps}); take "
            f"{math.ceil(warmup_steps / steps_per_epoch)} or more"
        )


def _name(trial: Any) -> str:
    """Tune's name for a trial, fixed when it is made."""
    return trial.config["trial"]["name"]


def _evaluate_chosen(book: Book, sweep: Sweep, config: Config, best: Trial, say: Say) -> None:
    """The test split is seen once, by the one run that was chosen on val."""
    objective = next(iter(config.tune.objectives))
    if best.state != "finished" or "recall" not in objective or sweep.chosen == best.run:
        return
    metrics = evaluate(with_values(config, best.values | {"name": best.run, "seed": best.seed}))
    book.choose(best.run, metrics)
    for name, value in metrics["zeroshot_retrieval"].items():
        say(f"tune: {best.run}: {config.evaluation.split}: {name:28} {value:7.2%}")


def _concurrent(config: Config) -> int:
    """How many trials run together: what was asked for, or what fits into the nodes there are."""
    if config.tune.concurrent is not None:
        return config.tune.concurrent
    cluster, there = config.cluster, ray.cluster_resources()
    readers_cpus = READER_CPUS * cluster.readers_per_worker
    cpus = cluster.num_workers * (cluster.cpus_per_worker + readers_cpus)
    fits = there.get("CPU", 0) // cpus
    if cluster.gpus_per_worker:
        gpus = cluster.num_workers * cluster.gpus_per_worker
        fits = min(fits, there.get("GPU", 0) // gpus)
    return max(1, int(fits))


class _Ends(ray.tune.Stopper):
    """Ends all trials where the budget is used up, or the lease was lost."""

    def __init__(self, book: Book, lost: list[str]) -> None:
        self._book, self._lost = book, lost

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Called by Tune for each report."""
        return self.stop_all()

    def stop_all(self) -> bool:
        """Called by Tune, often."""
        return bool(self._lost) or self._book.spent() is not None


class _Keeper(TrialProgressCallback):
    """Keeps the book, and says what happens, in the place of Tune's own callback of this kind."""

    def __init__(
        self,
        book: Book,
        scheduler: TrialScheduler,
        hours_left: Callable[[], float | None],
        say: Say,
    ) -> None:
        super().__init__()
        self._book, self._scheduler, self._hours_left, self._say = book, scheduler, hours_left, say
        self._replayed: set[int] = set()

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Called by Tune. What a resumed trial reported before is told once."""
        number = int(str(trial))
        if number not in self._replayed:
            self._replayed.add(number)
            replay_reports(self._scheduler, trial, self._book.trials[number])

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
    ) -> None:
        """Called by Tune."""
        kept = self._book.report(int(str(trial)), result)
        if kept.state != "failed":
            objective = self._book.objective
            self._say(
                f"tune: {kept.run}: epoch {kept.epochs}, {objective} {kept.figure(objective)}"
            )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Called by Tune."""
        self._say_end(self._book.end(int(str(trial))))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Called by Tune, where it does not try again."""
        lines = str(trial.get_error()).strip().splitlines()
        self._say_end(self._book.end(int(str(trial)), error=lines[-1]))

    def _say_end(self, trial: Trial) -> None:
        why = f": {trial.error}" if trial.error else ""
        self._say(
            f"tune: {trial.run}: {trial.state}{why} after {trial.epochs} epochs and "
            f"{trial.worker_hours:.3g} h; together {self._book.worker_hours:.3g} h, some "
            f"{self._hours_left():.2g} h left"
        )
