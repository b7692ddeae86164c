"""The first objective over two fields: the points themselves, and what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go

from clip_ray.config import Config
from clip_ray.tuning.comparisons import by_importance
from clip_ray.tuning.figures import DARK, GREY, SCALE, STAR, Plot, describe, styled
from clip_ray.tuning.journal import Trial
from clip_ray.tuning.space import Distribution, Space
from clip_ray.tuning.study import values_of
from clip_ray.tuning.summary import best_points, counted, first_objective, number

_USUAL = ("loss.temperature", "optim.lr")
# Fewer points have nothing between them that could be drawn in good faith.
_MAP_POINTS = 6
_CELLS = 160
# Of an axis, beyond the outermost values of the space.
_MARGIN = 0.05
_LOG_RATIO = 20


@dataclass(frozen=True)
class _Axis:
    field: str
    low: float
    high: float
    log: bool

    def unit(self, values: Any) -> np.ndarray:
        """From 0 at the low to 1 at the high, on the axis's own scale."""
        return (self._scaled(values) - self._scaled(self.low)) / self._span

    def at(self, units: Any) -> np.ndarray:
        """The values at such places of the axis."""
        scaled = self._scaled(self.low) + np.asarray(units) * self._span
        return 10**scaled if self.log else scaled

    @property
    def layout(self) -> dict[str, Any]:
        bounds = self.at([-_MARGIN, 1 + _MARGIN])
        bounds = np.log10(bounds) if self.log else bounds
        # On a log axis plotly would write 2, 5 between the powers, without the power.
        ticks: dict[str, Any] = {}
        if self.log:
            places = _log_ticks(self.low, self.high)
            ticks = {"tickvals": places, "ticktext": [number(place) for place in places]}
        kind = "log" if self.log else "linear"
        return {"title_text": self.field, "type": kind, "range": list(bounds), **ticks}

    @property
    def _span(self) -> Any:
        return self._scaled(self.high) - self._scaled(self.low)

    def _scaled(self, values: Any) -> np.ndarray:
        return np.log10(values) if self.log else np.asarray(values, float)


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    value: float
    point: Sequence[Trial]

    @property
    def stopped(self) -> bool:
        return all(trial.state != "finished" for trial in self.point)


def heat_map(
    points: Sequence[Sequence[Trial]], study: optuna.Study, config: Config, space: Space
) -> Plot:
    """Temperature by learning rate where the space varies both, else the two that matter most.

    `points` are those that ended.
    """
    objective = first_objective(config)
    axes = _axes(space, study, config)
    if axes is None:
        return Plot("map", f"{objective} by two fields", "The space varies no two numbers.")
    across, up = axes
    title = f"{objective} by {across.field} and {up.field}"
    dots = _dots(points, axes, config)
    if not dots:
        return Plot("map", title, "No point with both fields has ended yet.")
    figure = go.Figure()
    note = counted(len(dots), "point")
    if early := sum(dot.stopped for dot in dots):
        note += f", {early} of them not trained to their end (✕): they stand by their last figure"
    note += "; ★ is the best. "
    colours = _colours(dots, config)
    outline = "white" if len(dots) >= _MAP_POINTS else GREY
    if len(dots) >= _MAP_POINTS:
        ground, width = _ground(dots, axes)
        figure.add_trace(ground.update(coloraxis="coloraxis"))
        note += (
            f"The ground is a weighted mean of the points around, {width:.2f} of an axis wide, "
            "and empty where there is none: it says where to look, not what one would find."
        )
    else:
        note += f"Fewer than {_MAP_POINTS} make no map: only the points are drawn."
    best, *_ = best_points([trial for dot in dots for trial in dot.point], config)
    for kind in ("circle", "x", "star"):
        chosen = [dot for dot in dots if _symbol(dot, best[0].point) == kind]
        figure.add_trace(_scatter(chosen, kind, outline))
    figure = styled(
        figure, plot_bgcolor="#f4f6f8", coloraxis=colours, xaxis=across.layout, yaxis=up.layout
    )
    frame = {"showgrid": False, "showline": True, "mirror": True, "linecolor": GREY}
    figure.update_xaxes(frame)
    figure.update_yaxes(frame)
    return Plot("map", title, note, figure, 520)


def _axes(space: Space, study: optuna.Study, config: Config) -> tuple[_Axis, _Axis] | None:
    numeric = {name: field for name, field in space.fields.items() if _is_numeric(field)}
    if all(name in numeric for name in _USUAL):
        chosen = list(_USUAL)
    else:
        known = [name for name in by_importance(study, config) if name in numeric]
        all_of_them = [*known, *(name for name in numeric if name not in known)]
        # What is drawn on a condition would leave out the points without it.
        chosen = sorted(all_of_them, key=lambda name: bool(numeric[name].when))[:2]
    if len(chosen) < 2:
        return None
    across, up = (_axis(name, numeric[name]) for name in chosen)
    return across, up


def _is_numeric(distribution: Distribution) -> bool:
    values = distribution.values
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return numbers and len(set(values)) > 1


def _axis(name: str, distribution: Distribution) -> _Axis:
    low, high = min(distribution.values), max(distribution.values)
    listed = distribution.kind in ("choice", "grid")
    log = low > 0 and (
        distribution.kind == "loguniform" or name in _USUAL or (listed and high / low >= _LOG_RATIO)
    )
    return _Axis(name, low, high, log)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power within; the powers alone where those would be too many."""
    powers = [
        10.0**p for p in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ]
    steps = (1, 2, 5) if high / low <= 1000 else (1,)
    return [
        float(f"{s * p:.1e}")
        for p in powers
        for s in steps
        if low <= s * p * 1.001 and s * p <= high * 1.001
    ]


def _dots(
    points: Sequence[Sequence[Trial]], axes: tuple[_Axis, _Axis], config: Config
) -> list[_Dot]:
    across, up = axes
    found = []
    for point in points:
        values, figures = point[0].values, values_of(config, point)
        if figures and across.field in values and up.field in values:
            x, y = (float(values[axis.field] or 0) for axis in axes)
            found.append(_Dot(x, y, figures[0], point))
    return found


def _ground(dots: Sequence[_Dot], axes: tuple[_Axis, _Axis]) -> tuple[go.Heatmap, float]:
    """Gaussian weights around each cell, and their width: Scott's, of points spread evenly."""
    across, up = axes
    width = 12**-0.5 * len(dots) ** (-1 / 6)
    edges = np.linspace(-_MARGIN, 1 + _MARGIN, _CELLS + 1)
    cells = (edges[1:] + edges[:-1]) / 2
    x, y = across.unit([dot.x for dot in dots]), up.unit([dot.y for dot in dots])
    squares = (cells[None, :, None] - x) ** 2 + (cells[:, None, None] - y) ** 2
    weights = np.exp(-squares / (2 * width**2))
    means = (weights * [dot.value for dot in dots]).sum(-1) / weights.sum(-1)
    means[np.sqrt(squares.min(-1)) > width] = np.nan
    ground = go.Heatmap(
        x=across.at(edges),
        y=up.at(edges),
        z=means.astype(np.float32),
        hoverinfo="skip",
    )
    return ground, width


def _symbol(dot: _Dot, best: int) -> str:
    return "star" if dot.point[0].point == best else "x" if dot.stopped else "circle"


def _scatter(dots: Sequence[_Dot], symbol: str, outline: str) -> go.Scatter:
    # The best in a colour of its own: in the scale's it would be lost on its own ground.
    colour = (
        {"color": STAR}
        if symbol == "star"
        else {
            "color": [dot.value for dot in dots],
            "coloraxis": "coloraxis",
        }
    )
    return go.Scatter(
        x=[dot.x for dot in dots],
        y=[dot.y for dot in dots],
        mode="markers",
        showlegend=False,
        text=[f"{describe(dot.point[0])}<br><b>{number(dot.value)}</b>" for dot in dots],
        hovertemplate="%{text}<extra></extra>",
        marker={
            **colour,
            "symbol": symbol,
            "size": 22 if symbol == "star" else 12,
            "line": {"width": 1.5, "color": DARK if symbol == "x" else outline},
        },
    )


def _colours(dots: Sequence[_Dot], config: Config) -> dict[str, Any]:
    objective, goal = next(iter(config.tune.objectives.items()))
    low, high = min(dot.value for dot in dots), max(dot.value for dot in dots)
    title = {"text": objective, "side": "right", "font": {"size": 13}}
    return {
        "colorscale": SCALE,
        "reversescale": goal == "min",
        # One value alone has no range, and stands in the middle of one.
        "cmin": low if low < high else low - 1,
        "cmax": high if low < high else high + 1,
        "showscale": low < high,
        "colorbar": {"title": title, "thickness": 12, "outlinewidth": 0},
    }
