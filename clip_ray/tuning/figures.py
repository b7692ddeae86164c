"""The plots of a sweep's report. Each says why it is missing where there is too little for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from clip_ray.config import Config
from clip_ray.tuning.journal import Report, Trial
from clip_ray.tuning.summary import best_points, counted, first_objective, number

# The best three points; the others are grey.
BEST_COLOURS = ("#1f5fbf", "#e8710a", "#2f9e44")
GREY, DARK, LINE, STAR = "#b3bcc8", "#1d2530", "#e6eaef", "#ffb000"
# From bad to good. It begins darker than the page, so that bad lines are seen too.
SCALE = ["#d3dae3", "#9dbde2", "#4f8acb", "#1f4f9a", "#0a2450"]


@dataclass(frozen=True)
class Plot:
    """A figure with what is to be said of it; without a figure, why there is none."""

    key: str
    title: str
    note: str
    figure: go.Figure | None = None
    height: int = 420


def curves(trials: Sequence[Trial], config: Config) -> Plot:
    """The first objective over the epochs, the best points in colours, on top of the others."""
    objective = first_objective(config)
    title = f"{objective} over epochs"
    best = best_points(trials, config)[: len(BEST_COLOURS)]
    places = {trial.number: place for place, point in enumerate(best) for trial in point}
    # Later lines are drawn above: the best last.
    order = sorted(trials, key=lambda trial: (-places.get(trial.number, 99), trial.number))
    lines = [line for t in order if (line := _curve(t, objective, places.get(t.number)))]
    if not lines:
        return Plot("curves", title, f"No trial has reported {objective} yet.")
    figure = styled(go.Figure([*lines, *_legend(best)]), hovermode="closest")
    figure.update_layout(margin_t=36)
    figure.update_xaxes(title_text="epoch", tickformat="d")
    figure.update_yaxes(title_text=objective)
    note = f"{counted(len(lines), 'trial')}, the best points in colour; ✕: stopped early."
    return Plot("curves", title, note, figure)


def styled(figure: go.Figure, **layout: Any) -> go.Figure:
    """The figure in the page's own hand."""
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": DARK},
        margin={"l": 64, "r": 20, "t": 16, "b": 52},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"bgcolor": "white", "font": {"family": "system-ui, sans-serif"}},
    )
    axis: dict[str, Any] = {"gridcolor": LINE, "zeroline": False, "title": {"font": {"size": 13}}}
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    return figure.update_layout(**layout)


def describe(trial: Trial) -> str:
    """A trial's run, what became of it, and its values, for the label that follows the mouse."""
    values = [f"{field}: {number(value)}" for field, value in trial.values.items()]
    return "<br>".join([f"<b>{trial.run}</b> ({trial.state})", *values])


def _curve(trial: Trial, objective: str, place: int | None) -> go.Scatter | None:
    points = [
        (report.epoch, value)
        for report in trial.reports
        if (value := _figure(report, objective)) is not None
    ]
    if not points:
        return None
    best = place is not None
    last = ["x" if trial.state == "stopped" else "circle"]
    sizes = [4 if best else 0] * (len(points) - 1) + [8 if best or last == ["x"] else 4]
    return go.Scatter(
        x=[epoch for epoch, _ in points],
        y=[value for _, value in points],
        mode="lines+markers",
        showlegend=False,
        line={
            "color": BEST_COLOURS[place] if place is not None else GREY,
            "width": 2.5 - 1.3 * (not best),
        },
        marker={
            "symbol": ["circle"] * (len(points) - 1) + last,
            "size": sizes,
            "opacity": 1,
            "line": {"width": 0},
        },
        text=[number(value) for _, value in points],
        hovertemplate=f"{describe(trial)}<br>epoch %{{x}}: <b>%{{text}}</b><extra></extra>",
    )


def _legend(best: Sequence[Sequence[Trial]]) -> list[go.Scatter]:
    """A name for each of the best points, whatever the number of its lines."""
    found = []
    for place, (rank, point) in enumerate(zip(("best", "2nd", "3rd"), best, strict=False)):
        name = f"{rank}: {point[0].run}"
        if len(point) > 1:
            name += f" and {counted(len(point) - 1, 'other seed')}"
        line = {"color": BEST_COLOURS[place], "width": 2.5}
        found.append(go.Scatter(x=[None], y=[None], mode="lines", name=name, line=line))
    return found


def _figure(report: Report, name: str) -> float | None:
    return (report.figures | {"worker_hours": report.worker_hours}).get(name)
