"""Which trial is next: those that were cut off first, then new points as the search draws them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from clip_ray.config import Config
from clip_ray.tuning.book import Book
from clip_ray.tuning.journal import Trial
from clip_ray.tuning.space import Space
from clip_ray.tuning.study import make_study, values_of
from clip_ray.tuning.trial import task_of


class Points(Searcher):
    """Ray Tune's searcher over an Optuna study in memory, which is made anew from the journal."""

    def __init__(self, config: Config, space: Space, book: Book) -> None:
        super().__init__()
        self._config, self._space, self._book = config, space, book
        self._study = make_study(config, space, list(book.trials.values()))
        self._asked: dict[int, optuna.Trial] = {}
        most, grid = config.tune.max_trials, config.tune.search == "grid"
        self._grid = list(islice(space.combinations(), most)) if grid else None
        self._points = most if self._grid is None else len(self._grid)
        self._next = self.trials()

    @property
    def total(self) -> int:
        """Trials of the whole sweep."""
        return self._points * self._config.tune.repeats

    def trials(self) -> Iterator[Trial]:
        """Those that are left to run, in order; new ones are drawn when they are reached."""
        known = list(self._book.trials.values())
        yield from [trial for trial in known if trial.state == "running"]
        for point in range(self._points):
            begun = {trial.seed: trial.values for trial in known if trial.point == point}
            values = next(iter(begun.values()), None)
            for seed in range(self._config.seed, self._config.seed + self._config.tune.repeats):
                if seed not in begun:
                    values = self._values(point) if values is None else values
                    yield self._book.add(point, seed, values)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's task. Called by Tune."""
        self._tell_ended()
        trial = next(self._next, None)
        return self.FINISHED if trial is None else task_of(trial)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Called by Tune. The book knows."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it with its own state, which is never read

    def save(self, checkpoint_path: str) -> None:
        """Called by Tune. The journal is what a sweep is resumed from."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""

    def _values(self, point: int) -> dict[str, Any]:
        if self._grid is not None:
            return self._grid[point]
        self._asked[point] = self._study.ask()
        return self._space.draw(self._asked[point], point)

    def _tell_ended(self) -> None:
        for point, asked in list(self._asked.items()):
            trials = [trial for trial in self._book.trials.values() if trial.point == point]
            whole = len(trials) == self._config.tune.repeats
            if whole and all(trial.state != "running" for trial in trials):
                values = values_of(self._config, trials)
                state = TrialState.FAIL if values is None else TrialState.COMPLETE
                self._study.tell(asked, values, state=state)
                del self._asked[point]
