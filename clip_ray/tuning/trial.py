"""One trial: the driver of a training run, inside a Ray Tune actor.

A run of Ray Train hands Tune no checkpoint, so that PBT would skip every exploit. The bridge: Tune
is given a pointer, a file that names a run and a step of it. A trial that starts with the pointer
of another one forks that run's state; with its own, it goes on.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.tune
from pydantic import BaseModel

from clip_ray.config import Config
from clip_ray.config_file import parse_config
from clip_ray.errors import RunError
from clip_ray.storage import Storage
from clip_ray.training.checkpoint import Checkpoints
from clip_ray.training.launch import train
from clip_ray.training.ledger import BEST_METRIC, LEDGER
from clip_ray.training.run import METRICS_KEY
from clip_ray.tuning.journal import Trial
from clip_ray.tuning.space import with_values

POINTER = "pointer.json"
FAILED = "failed"
# What another trial exploits must still be there when it starts.
KEPT_FOR_PBT = 4
REPORTED = ("step", "epoch", "loss", "images_per_s")


class Pointer(BaseModel):
    """A checkpoint of a run."""

    run: str
    step: int


def task_of(trial: Trial) -> dict[str, Any]:
    """What Tune hands a trial, which PBT copies from one to another: all but Tune's name for it."""
    return {
        "trial": {
            "name": name_of(trial.number),
            "seed": trial.seed,
            "values": dict(trial.values),
            "run": trial.run,
            "epochs": trial.epochs,  # that are known
        }
    }


def name_of(number: int) -> str:
    """Of a trial, in Tune and in its run's name."""
    return f"{number:04d}"


def drive(task: dict[str, Any], base: dict[str, Any]) -> None:
    """Trains the trial's run to its end, or until Tune stops it; its reports go to Tune."""
    began_at_s = time.time()
    config = parse_config(base, origin="the sweep's config")
    run, fork = _run_and_fork(config, task["trial"]["run"])
    about = {"run": run, "fork": fork, "values": task["trial"]["values"]}
    resolved = _resolved(config, task["trial"], run, fork)
    report = _report_with_pointer if config.tune.scheduler == "pbt" else ray.tune.report

    last: list[dict[str, Any]] = []

    def heard(figures: dict[str, float]) -> None:
        first_step_at_s = figures.pop("first_step_at_s", None)
        start_s = None if first_step_at_s is None else first_step_at_s - began_at_s
        told = {"figures": figures, "epoch": figures["epoch"], "start_s": start_s, **about}
        # A scheduler may end a trial at its last epoch, too: then it shall have its weights.
        last.append(told) if told["epoch"] == resolved.train.epochs else report(told)

    if fork is None:
        for figures in _unheard(resolved, task["trial"]["epochs"]):
            heard(figures)
    try:
        train(resolved, print, heard)
        for told in last:
            report(told)
    except RunError as error:  # not raised: Tune would try again what has failed for good
        ray.tune.report({FAILED: str(error)})


def _run_and_fork(config: Config, run: str) -> tuple[str, str | None]:
    """The trial's run, and the RUN@STEP that it is to begin with."""
    checkpoint = ray.tune.get_checkpoint()
    if checkpoint is None:
        return run, None
    with checkpoint.as_directory() as folder:
        pointer = Pointer.model_validate_json((Path(folder) / POINTER).read_text())
    own = f"{config.name}-{ray.tune.get_context().get_trial_name()}"
    if pointer.run == own or pointer.run.startswith(f"{own}."):
        return pointer.run, None
    runs = Storage(config.storage.root).below("runs")
    names = (f"{own}.{count}" for count in itertools.count(1))
    free = next(name for name in names if not runs.exists(f"{name}/{LEDGER}"))
    return free, f"{pointer.run}@{pointer.step}"


def _resolved(config: Config, trial: Mapping[str, Any], run: str, fork: str | None) -> Config:
    changes = {**trial["values"], "name": run, "seed": trial["seed"]}
    if fork is not None:
        changes |= {"start.fork": fork, "start.weights": None}
    if config.tune.scheduler == "pbt":
        keep_last = max(KEPT_FOR_PBT, config.checkpoint.keep_last)
        changes |= {"checkpoint.every_epochs": 1, "checkpoint.keep_last": keep_last}
    return with_values(config, changes)


def _unheard(config: Config, epochs: int) -> list[dict[str, float]]:
    """Reports of later epochs, from the log of a run that was cut off after their checkpoints."""
    run = Storage(config.run_root)
    newest = Checkpoints(run).newest()
    if newest is None or ray.tune.get_checkpoint() is not None:
        return []
    log: list[dict[str, Any]] = [json.loads(x) for x in run.read_bytes(METRICS_KEY).splitlines()]
    validated = [e for e in log if BEST_METRIC in e and e["step"] <= newest.step]
    return [
        {name: value for name, value in entry.items() if name in REPORTED or "recall" in name}
        | {"run_s": 0.0}
        for entry in validated
        if entry["epoch"] > epochs
    ]


def _report_with_pointer(told: dict[str, Any]) -> None:
    """To Tune, with a pointer to the checkpoint of the report's step, which is there by now."""
    pointer = Pointer(run=told["run"], step=int(told["figures"]["step"]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / POINTER).write_text(pointer.model_dump_json())
        ray.tune.report(told, checkpoint=ray.tune.Checkpoint.from_directory(folder))
