"""Which trials are stopped early, or go on from others: Ray Tune's schedulers, by the epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray.tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from clip_ray.config import Config
from clip_ray.tuning.journal import Trial
from clip_ray.tuning.space import Distribution, Space


def make_scheduler(config: Config, space: Space, all_at_once: bool = False) -> TrialScheduler:
    """What `config.tune.scheduler` names, by the first objective.

    `all_at_once` is told of trials that all run together.
    """
    tune = config.tune
    objective, goal = next(iter(tune.objectives.items()))
    by: dict[str, Any] = {"time_attr": "epoch", "metric": f"figures/{objective}", "mode": goal}
    if tune.scheduler == "asha":
        longest = max(map(int, _epochs(config, space)))
        return ASHAScheduler(
            **by,
            max_t=longest,
            grace_period=min(tune.grace_epochs, longest),
            reduction_factor=tune.reduction_factor,
        )
    if tune.scheduler == "median":
        return MedianStoppingRule(**by, grace_period=tune.grace_epochs)
    if tune.scheduler == "pbt":
        numbers = {n: _domain(d) for n, d in space.fields.items() if d.is_number}
        return (_AllAtOnce if all_at_once else PopulationBasedTraining)(
            **by,
            perturbation_interval=tune.perturb_epochs,
            quantile_fraction=tune.quantile,
            hyperparam_mutations={"trial": {"values": numbers}},
            custom_explore_fn=lambda task: _clipped(task, space),
            require_attrs=False,
            log_config=False,
        )
    return FIFOScheduler()


def replay(scheduler: TrialScheduler, trials: Iterable[Trial]) -> None:
    """Tells a scheduler of trials that ended before it was made."""
    for trial in trials:
        ended: Any = _Ended(trial.number)
        scheduler.on_trial_add(_NO_CONTROLLER, ended)
        replay_reports(scheduler, ended, trial)


def replay_reports(scheduler: TrialScheduler, of_tune: Any, trial: Trial) -> None:
    """Tells a scheduler what a trial reported before, whatever it would do about it."""
    if not isinstance(scheduler, ASHAScheduler | MedianStoppingRule):
        return
    for report in trial.reports:
        figures = {f"figures/{name}": value for name, value in report.figures.items()}
        scheduler.on_trial_result(_NO_CONTROLLER, of_tune, {"epoch": report.epoch, **figures})


class _Ended:
    """What ASHA and the median rule know of a trial: its name."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"ended-{number}"


# Neither of the two asks it for anything.
_NO_CONTROLLER: Any = None


class _AllAtOnce(PopulationBasedTraining):
    """Has no trial make way for one that is about to exploit: there is room for each."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune for each report."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if decision == self.PAUSE else decision


def _epochs(config: Config, space: Space) -> tuple[Any, ...]:
    varied = space.fields.get("train.epochs")
    return varied.values if varied else (config.train.epochs,)


def _domain(distribution: Distribution) -> Any:
    low, high = distribution.values
    if distribution.kind == "loguniform":
        return ray.tune.loguniform(low, high)
    if distribution.kind == "quniform":
        return ray.tune.quniform(low, high, distribution.step or 1)
    return (
        ray.tune.uniform(low, high)
        if distribution.kind == "uniform"
        else ray.tune.randint(low, high + 1)
    )


def _clipped(task: dict[str, Any], space: Space) -> dict[str, Any]:
    trial = task["trial"]
    return {"trial": trial | {"values": space.clip(trial["values"])}}
