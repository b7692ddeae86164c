"""Sweeps as a journal holds them, made up: no cluster, the same every time."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from conftest import SHAPES_YAML

from clip_ray.config import Config
from clip_ray.config_file import load_config
from clip_ray.tuning.journal import Report, Sweep, Trial, parse_sweep
from clip_ray.tuning.space import Scalar, Space

RECALL = "image_retrieval_recall@1"
SPACE = {
    "loss.learn_temperature": {"choice": [True, False]},
    "loss.temperature": {"loguniform": [0.02, 0.2]},
    "optim.lr": {"loguniform": [2.0e-4, 4.0e-3]},
}


def made_up_sweep(
    tune: Mapping[str, Any] | None = None, fields: Mapping[str, Any] | None = None
) -> tuple[Sweep, Space, Config]:
    """A sweep of the shapes config with two GPUs, with these settings of `tune`."""
    config = load_config(SHAPES_YAML, ["cluster.gpus_per_worker=1", "name=made-up"])
    space = {"tune": {"max_trials": 12} | dict(tune or {}), "space": dict(fields or SPACE)}
    sweep = Sweep(config=config.model_dump(mode="json"), space=space, hours=1.75)
    # As the sweep's own command has it: what the config does not say, the space file does.
    sweep.config["tune"] = {}
    return sweep, *parse_sweep(sweep, {})


def made_up_trials(count: int = 12, epochs: int = 14, seed: int = 0) -> list[Trial]:
    """Recall has its best near a temperature of 0.06 and a rate of 1.2e-3; ten are run well."""
    draw = random.Random(seed)
    trials = []
    for number in range(count):
        values: dict[str, Scalar] = {
            "loss.learn_temperature": draw.random() < 0.6,
            "loss.temperature": 0.02 * 10 ** draw.random(),
            "optim.lr": 2e-4 * 20 ** draw.random(),
        }
        trials.append(made_up_trial(number, values, epochs=epochs))
    return trials


def made_up_trial(
    number: int,
    values: dict[str, Scalar],
    *,
    epochs: int = 14,
    state: Literal["running", "finished", "stopped", "failed"] = "finished",
    point: int | None = None,
    seed: int = 0,
) -> Trial:
    """A trial whose figures follow from its values and its seed."""
    noise = random.Random(1000 * number + seed)
    top = recall_of(values) + noise.gauss(0, 0.004)
    return Trial(
        number=number,
        point=number if point is None else point,
        seed=seed,
        values=values,
        run=f"made-up-{number:05d}",
        state=state,
        start_s=20 + 10 * noise.random(),
        reports=[
            Report(
                epoch=epoch,
                step=40 * epoch,
                worker_hours=0.02 * epoch,
                figures={
                    RECALL: top * (1 - math.exp(-epoch / 4)) + noise.gauss(0, 0.004),
                    "loss": 4 - 3 * top * (1 - math.exp(-epoch / 4)),
                    "images_per_s": 900 + 60 * noise.random(),
                },
            )
            for epoch in range(1, epochs + 1)
        ],
    )


def recall_of(values: Mapping[str, Scalar]) -> float:
    """What the figures are made from, without its noise."""
    temperature = math.log10(float(values["loss.temperature"] or 0) / 0.06)
    rate = math.log10(float(values["optim.lr"] or 0) / 1.2e-3)
    bonus = 0.03 if values["loss.learn_temperature"] else 0
    return 0.68 + bonus - 0.9 * temperature**2 - 0.5 * rate**2


def as_asha_leaves_them(trials: Sequence[Trial]) -> list[Trial]:
    """The weaker half stopped after two to four epochs, one failed, the last still running."""
    weak = sorted(trials, key=lambda trial: trial.figure(RECALL) or 0)[: len(trials) // 2]
    found = [
        trial.model_copy(
            update={"state": "stopped", "reports": trial.reports[: 2 + trial.number % 3]}
        )
        if trial in weak
        else trial
        for trial in trials
    ]
    lost = {"state": "failed", "error": "RunError: <two> workers died", "reports": []}
    found[3] = found[3].model_copy(update=lost)
    found[-1] = found[-1].model_copy(update={"state": "running", "reports": found[-1].reports[:5]})
    return found
