"""The report of a sweep: one HTML file with its plots and tables, readable at any time of it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.io
import yaml
from jinja2 import Environment
from markupsafe import Markup

from clip_ray.config import Config
from clip_ray.config_file import dump_config
from clip_ray.tuning.comparisons import importances, parallel_coordinates, pareto_front
from clip_ray.tuning.figures import Plot, curves
from clip_ray.tuning.heat_map import heat_map
from clip_ray.tuning.journal import Sweep, Trial, ranked
from clip_ray.tuning.results import gpu_hours
from clip_ray.tuning.space import Space
from clip_ray.tuning.study import make_study
from clip_ray.tuning.summary import (
    NONE,
    best_points,
    cost,
    duration,
    finite,
    number,
    planned_epochs,
    points_of,
    saved_share,
    savings,
    spreads,
)

_STATES = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "running": "running",
}


def write_report(
    path: Path, sweep: Sweep, trials: Sequence[Trial], config: Config, space: Space
) -> None:
    """Writes the page to `path`. It needs nothing beside itself: no network.

    `config` and `space` are the sweep's, by `parse_sweep`. What has too few trials yet says so.
    """
    trials = sorted((finite(trial) for trial in trials), key=lambda trial: trial.number)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "duration": duration}
    template = resources.files(__package__ or "").joinpath("report.html.j2").read_text("utf-8")
    page = environment.from_string(template).render(
        config=config,
        sweep=sweep,
        states=_STATES,
        counts={state: sum(trial.state == state for trial in trials) for state in _STATES},
        planned=config.tune.max_trials * config.tune.repeats,
        best=_best(trials, config),
        plots=_embedded(_plots(trials, config, space)),
        savings=savings(trials, config),
        saved_share=saved_share(trials, config),
        exploits=_exploits(trials),
        cost=cost(trials, config),
        **_table(trials, config),
        config_yaml=dump_config(config),
        space_yaml=yaml.safe_dump(sweep.space, sort_keys=False, allow_unicode=True),
        dash=NONE,
    )
    path.write_text(page, encoding="utf-8")


def _best(trials: Sequence[Trial], config: Config) -> dict[str, Any] | None:
    points = best_points(trials, config)
    if not points:
        return None
    point = points[0]
    return {
        "trial": point[0],
        "runs": [trial.run for trial in point],
        "values": point[0].values,
        "spreads": spreads(point, config),
        "planned": planned_epochs(point[0], config),
    }


def _plots(trials: Sequence[Trial], config: Config, space: Space) -> list[Plot]:
    study = make_study(config, space, trials)
    ended = [point for point in points_of(trials) if all(t.state != "running" for t in point)]
    plots = [curves(trials, config), heat_map(ended, study, config, space)]
    if len(config.tune.objectives) > 1:
        plots.append(pareto_front(study, config, [point[0].point for point in ended]))
    return [*plots, parallel_coordinates(study, config), importances(study, config)]


def _embedded(plots: Sequence[Plot]) -> list[dict[str, Any]]:
    """Each with its HTML; the first that has a figure brings plotly's script along."""
    found: list[dict[str, Any]] = []
    for plot in plots:
        html = None
        if plot.figure is not None:
            html = plotly.io.to_html(
                plot.figure,
                config={"displaylogo": False, "responsive": True},
                include_plotlyjs=not any(other["html"] for other in found),
                full_html=False,
                default_height=f"{plot.height}px",
                div_id=f"plot-{plot.key}",
            )
        found.append({"plot": plot, "html": Markup(html) if html else None})
    return found


def _exploits(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """In the order of their epochs, each with the number of the trial that it went on from."""
    numbers = {run: trial.number for trial in trials for run in _runs(trial)}
    found = [
        {
            "trial": trial,
            "exploit": exploit,
            "source": numbers.get(exploit.source.rpartition("@")[0]),
        }
        for trial in trials
        for exploit in trial.exploits
    ]
    return sorted(found, key=lambda row: row["exploit"].epoch)


def _runs(trial: Trial) -> list[str]:
    """All of a trial's: RUN, and RUN.1, RUN.2, … from its first exploit on."""
    later = [exploit.run for exploit in trial.exploits]
    return [later[0].rpartition(".")[0], *later] if later else [trial.run]


def _table(trials: Sequence[Trial], config: Config) -> dict[str, Any]:
    """What the table of all trials is made of: its columns, and its rows, the best first."""
    rows = [
        {
            "trial": trial,
            "values": trial.values,
            "figures": {name: trial.figure(name) for name in config.tune.objectives},
            "planned": planned_epochs(trial, config),
            "gpu_hours": gpu_hours(trial, config),
        }
        for trial in ranked(trials, config)
    ]
    fields = dict.fromkeys(field for row in rows for field in row["values"])
    return {"rows": rows, "fields": list(fields)}
