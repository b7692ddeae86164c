"""A sweep's book and its points: what is counted, what comes next, what a journal brings back."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from conftest import SHAPES_YAML

from clip_ray.config import Config
from clip_ray.config_file import load_config
from clip_ray.storage import Storage
from clip_ray.tuning.book import Book
from clip_ray.tuning.journal import Journal, Sweep, Trial, ranked
from clip_ray.tuning.points import Points
from clip_ray.tuning.schedulers import make_scheduler, replay, replay_reports
from clip_ray.tuning.space import Space
from clip_ray.tuning.space_file import parse_space
from clip_ray.tuning.trial import FAILED

pytestmark = pytest.mark.s3
RECALL = "image_retrieval_recall@1"
TEXT = "optim.lr: {loguniform: [1e-4, 1e-2]}\nloss.temperature: {uniform: [0.05, 0.1]}"


def begun(storage: Storage, *overrides: str) -> tuple[Book, Config, Space]:
    config = load_config(SHAPES_YAML, ["name=s", "train.epochs=4", *overrides])
    space, config = parse_space({"space": yaml.safe_load(TEXT)}, config, origin="test")
    journal = Journal(storage)
    journal.write_sweep(Sweep(config=config.model_dump(mode="json"), space={}))
    return Book(journal, config), config, space


def result(trial: Trial, epoch: int, recall: float, run_h: float = 0.0, **others: Any) -> dict:
    figures = {"epoch": epoch, "step": 10 * epoch, RECALL: recall, "run_s": 3600 * run_h}
    about = {"run": trial.run, "fork": None, "values": trial.values}
    return {"epoch": epoch, "figures": figures, "start_s": 7.0, **about, **others}


def test_a_trial_is_in_the_journal_as_soon_as_it_is_in_the_book(storage: Storage) -> None:
    book, config, space = begun(storage)
    first = next(Points(config, space, book).trials())
    assert first.run == "s-0000"
    book.report(0, result(first, 1, 0.25, 0.5))
    book.report(0, result(first, 2, 0.5, 1.0))
    assert book.journal.trials() == [first]
    assert (first.epochs, first.figure(RECALL), first.worker_hours) == (2, 0.5, 1.0)
    assert first.start_s == 7.0
    assert book.end(0).state == "stopped"


def test_workers_that_were_started_again_have_cost_both_times(storage: Storage) -> None:
    book, config, space = begun(storage)
    trial = next(Points(config, space, book).trials())
    book.report(0, result(trial, 1, 0.1, 1.0))
    book.report(0, result(trial, 2, 0.2, 2.0))
    book.report(0, result(trial, 2, 0.2, 0.5))  # the epoch that was lost, once more
    assert [report.epoch for report in trial.reports] == [1, 2]
    assert trial.worker_hours == 2.5
    resumed = Book(book.journal, config)
    resumed.report(0, result(trial, 3, 0.3, 0.5))
    assert resumed.worker_hours == 3.0
    assert resumed.end(0).state == "stopped"


def test_ends_are_told_apart(storage: Storage) -> None:
    book, config, space = begun(storage, "tune.max_trials=4", "tune.max_gpu_hours=2",
                                "cluster.gpus_per_worker=0.5")  # fmt: skip
    trials = list(Points(config, space, book).trials())
    for epoch in range(1, 5):
        book.report(0, result(trials[0], epoch, 0.1))
    assert book.end(0).state == "finished"
    assert book.report(1, {FAILED: "no nodes"}).state == "failed"
    assert book.end(1).error == "no nodes"
    assert book.end(2, error="the actor died").state == "failed"
    book.report(3, result(trials[3], 1, 0.1, run_h=3.0))
    assert book.spent() == "tune.max_gpu_hours (2) are used up"
    assert book.gpu_hours == 3.0
    assert book.end(3).state == "running"  # the budget ended it: it may be resumed


def test_points_are_those_cut_off_and_then_new_ones(storage: Storage) -> None:
    book, config, space = begun(storage, "tune.max_trials=3", "tune.repeats=2", "seed=5")
    source = Points(config, space, book).trials()
    first, second, third = (next(source) for _ in range(3))
    assert (first.point, second.point, third.point) == (0, 0, 1)
    assert (first.seed, second.seed, third.seed) == (5, 6, 5)
    assert first.values == second.values != third.values
    book.end(0)
    points = Points(config, space, Book(book.journal, config))
    left = list(points.trials())
    assert points.total == 6
    assert [trial.number for trial in left] == [1, 2, 3, 4, 5]
    assert left[2].values == third.values  # the second seed of a point that was begun
    assert len({trial.values["optim.lr"] for trial in [first, *left]}) == 3


def test_optuna_learns_from_what_has_ended(storage: Storage) -> None:
    book, config, space = begun(storage, "tune.max_trials=24")
    points = Points(config, space, book)
    for number in range(24):
        task = points.suggest(str(number))
        assert isinstance(task, dict)
        trial = book.trials[number]
        miss = abs(float(trial.values["optim.lr"] or 0) - 5e-3) / 1e-2
        book.report(number, result(trial, 1, 1 - miss))
        book.end(number)
    assert points.suggest("none") == Points.FINISHED
    told = [trial.values for trial in points._study.trials]
    assert told == [[trial.figure(RECALL)] for trial in book.trials.values()]
    rates = [float(trial.values["optim.lr"] or 0) for trial in book.trials.values()]
    off = [abs(rate - 5e-3) for rate in rates]
    assert sum(off[16:]) < sum(off[:8])


def test_the_best_is_trained_to_its_end_and_stands_by_the_mean_of_its_seeds(
    storage: Storage,
) -> None:
    book, config, space = begun(storage, "tune.max_trials=3", "tune.repeats=2", "train.epochs=1")
    trials = list(Points(config, space, book).trials())
    for trial, recall in zip(trials, [0.9, 0.1, 0.6, 0.6, 0.0, 0.0], strict=True):
        if trial.point < 2:
            book.report(trial.number, result(trial, 1, recall))
    assert [trial.number for trial in ranked(trials, config)] == [2, 3, 0, 1, 4, 5]
    book.end(0)
    assert [trial.number for trial in ranked(trials, config)] == [0, 1, 2, 3, 4, 5]


def test_asha_knows_what_it_knew_before(storage: Storage) -> None:
    book, config, space = begun(storage, "tune.max_trials=4")
    trials = list(Points(config, space, book).trials())
    for trial, recall in zip(trials, [0.5, 0.6, 0.7, 0.1], strict=True):
        book.report(trial.number, result(trial, 1, recall))
    for number in range(3):
        book.end(number)
    scheduler: Any = make_scheduler(config, space)
    replay(scheduler, trials[:3])

    class OfTune:
        trial_id = "new"

    scheduler.on_trial_add(None, OfTune)
    replay_reports(scheduler, OfTune, trials[3])
    (rung,) = [recorded for milestone, recorded in scheduler._brackets[0]._rungs if milestone == 1]
    assert sorted(rung.values()) == [0.1, 0.5, 0.6, 0.7]
    decide = scheduler.on_trial_result
    assert decide(None, OfTune, {"epoch": 2, f"figures/{RECALL}": 0.2}) == "CONTINUE"
