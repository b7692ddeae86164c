"""Search spaces: config fields, each with a distribution, of which points are drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from clip_ray.config import Config
from clip_ray.config_file import parse_config, set_field

if TYPE_CHECKING:
    import optuna

Kind = Literal["uniform", "loguniform", "quniform", "randint", "choice", "grid"]
# No number of a config is like it, and a whole number is refused where one is wanted.
_INSIDE = 0.3819660112501051
Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Distribution:
    """Values of one field, drawn where all of `when` hold; elsewhere the config's own stays.

    uniform, loguniform, quniform (multiples of `step` above the low) and randint: between two
    bounds, both included. choice: one of the values, drawn. grid: each of the values.
    """

    kind: Kind
    values: tuple[Any, ...]
    step: float | None = None
    when: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict[str, tuple[Scalar, ...]])

    @property
    def is_number(self) -> bool:
        """Whether it lies between two bounds."""
        return self.kind not in ("choice", "grid")

    def nearest(self, value: float) -> float:
        """The value between the bounds, on a step where there are steps, that is nearest."""
        low, high = self.values
        step = self.step or (1 if isinstance(low, int) else None)
        if step is not None:
            value = low + round((value - low) / step) * step
        return min(max(value, low), high)

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that a config must take for all others to be right: both bounds, and within."""
        if self.kind not in ("uniform", "loguniform", "quniform"):
            return self.values
        low, high = self.values
        inside = low + (high - low) * _INSIDE if self.step is None else low + self.step
        return (low, high, inside)


@dataclass(frozen=True)
class Space:
    """The fields that a sweep varies. A field stands after those that its `when` names."""

    fields: Mapping[str, Distribution]

    def draw(self, trial: optuna.Trial, number: int) -> dict[str, Scalar]:
        """The values of point `number`: a grid's in turn, the others by Optuna's sampler."""
        grids = {name: d.values for name, d in self.fields.items() if d.kind == "grid"}
        combination = _combination(grids, number)
        values: dict[str, Scalar] = {}
        for name, distribution in self.fields.items():
            if _holds(distribution, values):
                values[name] = (
                    combination[name] if name in grids else _suggest(trial, name, distribution)
                )
        return values

    def combinations(self) -> Iterator[dict[str, Scalar]]:
        """All points of a space of choices and grids, each once."""
        seen: set[tuple[tuple[str, Scalar], ...]] = set()
        for chosen in itertools.product(*(d.values for d in self.fields.values())):
            values: dict[str, Scalar] = {}
            for (name, distribution), value in zip(self.fields.items(), chosen, strict=True):
                if _holds(distribution, values):
                    values[name] = value
            if (point := tuple(values.items())) not in seen:
                seen.add(point)
                yield values

    def clip(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers that were perturbed, back within their bounds."""
        clipped = dict(values)
        for name, value in values.items():
            if self.fields[name].is_number:
                clipped[name] = self.fields[name].nearest(value)
        return clipped


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values of some dotted fields, checked. Raises ConfigError."""
    tree = config.model_dump(mode="json")
    for dotted, value in values.items():
        set_field(tree, dotted, value)
    return parse_config(tree, origin="the search space")


def _holds(distribution: Distribution, values: Mapping[str, Scalar]) -> bool:
    return all(
        other in values and values[other] in wanted for other, wanted in distribution.when.items()
    )


def _combination(grids: Mapping[str, tuple[Any, ...]], number: int) -> dict[str, Any]:
    """The `number`-th of all combinations, begun anew after the last."""
    number %= prod(map(len, grids.values()))
    chosen = {}
    for name, values in grids.items():
        number, place = divmod(number, len(values))
        chosen[name] = values[place]
    return chosen


def _suggest(trial: optuna.Trial, name: str, distribution: Distribution) -> Scalar:
    if distribution.kind == "choice":
        return trial.suggest_categorical(name, distribution.values)
    low, high = distribution.values
    if isinstance(low, int):
        return trial.suggest_int(name, low, high, step=int(distribution.step or 1))
    return trial.suggest_float(
        name, low, high, step=distribution.step, log=distribution.kind == "loguniform"
    )
