"""All fields of a sweep at once: Optuna's plots of its study, in the report's own hand."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
import optuna.visualization
import plotly.graph_objects as go
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from plotly.colors import sample_colorscale

from clip_ray.config import Config
from clip_ray.tuning.figures import BEST_COLOURS, DARK, GREY, SCALE, Plot, styled
from clip_ray.tuning.summary import NONE, first_objective

_TOP_SHARE = 0.25
_HINT_POINTS = 20


def parallel_coordinates(study: optuna.Study, config: Config) -> Plot:
    """All fields of all points at once, by Optuna."""
    title, objective = "All fields at once", first_objective(config)
    if lack := _lack(study):
        return Plot("parallel", title, lack)
    with warnings.catch_warnings(action="ignore"):
        figure = optuna.visualization.plot_parallel_coordinate(
            study, target=lambda trial: trial.values[0], target_name=objective
        )
    figure = styled(figure, title=None)
    _name_axes(figure, objective, _complete(study))
    _colour_by_objective(figure, maximize=config.tune.objectives[objective] == "max")
    figure.update_layout(margin={"l": 30, "r": 20, "t": 20, "b": 50})
    note = f"A line is a point ({len(_complete(study))} that ended): darker is better."
    return Plot("parallel", title, note, figure)


def importances(study: optuna.Study, config: Config) -> Plot:
    """How much each field has to do with a point's being among the best, by Optuna."""
    title, objective = "Importance of the fields", first_objective(config)
    if lack := _lack(study):
        return Plot("importances", title, lack)
    with warnings.catch_warnings(action="ignore"):
        figure = optuna.visualization.plot_param_importances(
            study, _evaluator(), target=_low_is_good(config), target_name=objective
        )
    figure = styled(figure, title=None)
    figure.update_traces(marker_color=BEST_COLOURS[0], width=0.6)
    figure.update_xaxes(title_text="share", rangemode="tozero")
    figure.update_yaxes(title_text=None, automargin=True, showgrid=False, ticksuffix=" ")
    count = len(_complete(study))
    note = f"PED-ANOVA: what sets the best quarter of {count} points apart by {objective}."
    if count < _HINT_POINTS:
        note += " So few points give a hint, no more."
    bars: Any = figure.data[0]
    return Plot("importances", title, note, figure, 120 + 42 * len(bars.y))


def pareto_front(study: optuna.Study, config: Config, numbers: Sequence[int]) -> Plot:
    """What no other point beats in all objectives, by Optuna. `numbers` are the points' own."""
    names = list(config.tune.objectives)[:3]
    title = "Pareto front"
    if not _complete(study):
        return Plot("pareto", title, "No point has ended with all objectives yet.")
    with warnings.catch_warnings(action="ignore"):
        figure = optuna.visualization.plot_pareto_front(
            study, target_names=names, targets=lambda trial: trial.values[: len(names)]
        )
    figure = styled(figure, title=None, showlegend=True, margin_t=36)
    figure.update_layout(scene_aspectmode="cube", scene_camera_eye={"x": 1.7, "y": 1.7, "z": 0.7})
    # Of three objectives a size is one in space, and looks larger.
    small, large = (8, 11) if len(names) == 2 else (5, 7)
    kinds = (("beaten", GREY, small), ("on the front", BEST_COLOURS[0], large))
    traces: Any = figure.data
    for trace, (name, colour, size) in zip(traces, kinds, strict=True):
        trace.marker = {"color": colour, "size": size, "line": {"width": 1, "color": "white"}}
        trace.update(name=name, showlegend=True)
        trace.text = [_with_own_number(text, numbers) for text in trace.text]
    goals = ", ".join(f"{name} ({config.tune.objectives[name]})" for name in names)
    more = len(config.tune.objectives) - len(names)
    note = f"By {goals}" + (f"; {more} more objectives count, but are not drawn." if more else ".")
    return Plot("pareto", title, note, figure, 420 if len(names) == 2 else 560)


def by_importance(study: optuna.Study, config: Config) -> list[str]:
    """The fields, the most important first; none where there are too few points to say."""
    if _lack(study):
        return []
    with warnings.catch_warnings(action="ignore"):
        found = optuna.importance.get_param_importances(
            study, evaluator=_evaluator(), target=_low_is_good(config)
        )
    return sorted(found, key=lambda name: (-found[name], name))


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    """The points that have values."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _lack(study: optuna.Study) -> str:
    """Why there is nothing to compare; empty where there is."""
    points = _complete(study)
    if len({str(point.params) for point in points}) < 2:
        return f"Needs two points with different values that ended; so far: {len(points)}."
    return ""


def _evaluator() -> PedAnovaImportanceEvaluator:
    # Its own default is the best tenth: of a dozen points that is one.
    return PedAnovaImportanceEvaluator(target_quantile=_TOP_SHARE)


def _low_is_good(config: Config) -> Any:
    """The first objective as PED-ANOVA takes it: of a target it looks for low ones."""
    sign = -1 if next(iter(config.tune.objectives.values())) == "max" else 1
    return lambda trial: sign * trial.values[0]


def _name_axes(figure: go.Figure, objective: str, points: Sequence[FrozenTrial]) -> None:
    """Whole names, which Optuna cuts, and values as a config has them."""
    fields = sorted({field for point in points for field in point.params})
    names = [objective, *fields]
    words = {"True": "true", "False": "false", "None": "null", "None (value)": "null"}
    missing = {field for field in fields if any(field not in point.params for point in points)}
    by_axis = [words | ({"None": NONE} if name in missing else {}) for name in names]
    figure.update_xaxes(ticktext=[name.replace(".", ".<br>") for name in names])
    for mark in figure.layout.annotations:
        mark.update(text=by_axis[mark.x].get(mark.text, mark.text), bgcolor="rgba(255,255,255,.8)")
        mark.update(font={"size": 11, "color": DARK}, xshift=-5, borderpad=0)
    lines: Any = figure.data[:-1]
    for line in lines:
        line.customdata = [
            [name, of_axis.get(text, text)]
            for name, of_axis, (_, text) in zip(names, by_axis, line.customdata, strict=True)
        ]


def _colour_by_objective(figure: go.Figure, *, maximize: bool) -> None:
    """Optuna's own scale begins with white, on white; the best line lies on top here, too."""
    traces: Any = figure.data
    *lines, bar = traces

    # The first axis is the objective's, from 0 to 1.
    def goodness(line: Any) -> float:
        return line.y[0] if maximize else 1 - line.y[0]

    lines.sort(key=goodness)
    for line in lines:
        line.line.color = sample_colorscale(SCALE, goodness(line))[0]
        line.line.width = 3 if line is lines[-1] else 1.6
        line.opacity = 0.95
    bar.marker.update(colorscale=SCALE, reversescale=not maximize)
    bar.marker.colorbar.update(
        thickness=12, outlinewidth=0, title={"side": "right", "font": {"size": 13}}
    )
    figure.data = (*lines, bar)


def _with_own_number(text: str, numbers: Sequence[int]) -> str:
    """Optuna counts the points that ended; the report's other parts name a point by its own."""
    return re.sub(r'"number": (\d+)', lambda found: f'"point": {numbers[int(found[1])]}', text)
