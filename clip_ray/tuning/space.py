"""Search spaces are data: dotted config fields, each with a distribution, checked before use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clip_ray.config import Config
from clip_ray.config_file import parse_config, read_yaml, set_field
from clip_ray.errors import ConfigError

Kind = Literal["uniform", "loguniform", "choice"]
EXAMPLE = "lines such as `optim.lr: {uniform: [0.1, 0.2]}`"


@dataclass(frozen=True)
class Distribution:
    """`uniform` and `loguniform` between two bounds, or one `choice` of the values."""

    kind: Kind
    values: tuple[Any, ...]


Space = dict[str, Distribution]


def load_space(path: Path, config: Config) -> Space:
    """Reads a space and proves that `config` is right at every bound and choice of it.

    Raises ConfigError with every mistake in one report.
    """
    space: Space = {}
    mistakes: list[str] = []
    for dotted, text in read_yaml(path, EXAMPLE).items():
        try:
            space[dotted] = _distribution(text)
            for value in space[dotted].values:
                with_values(config, {dotted: value})
        except ConfigError as error:
            reason = str(error).splitlines()[-1].removeprefix("  - ")
            mistakes.append(reason if reason.startswith(dotted) else f"{dotted}: {reason}")
    if mistakes:
        count = f"{len(mistakes)} error{'s' if len(mistakes) > 1 else ''}"
        raise ConfigError("\n".join([f"{path}: {count}", *(f"  - {line}" for line in mistakes)]))
    return space


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """`config` with other values of some dotted fields, checked. Raises ConfigError."""
    tree = config.model_dump(mode="json")
    for dotted, value in values.items():
        set_field(tree, dotted, value)
    return parse_config(tree, origin="the search space")


def _distribution(text: Any) -> Distribution:
    known = get_args(Kind)
    if not isinstance(text, dict) or len(text) != 1 or next(iter(text)) not in known:
        raise ConfigError(f"{text!r} must be {{kind: values}}, kind one of {', '.join(known)}")
    kind, values = next(iter(text.items()))
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{kind} is {values!r}: must be a list")
    if kind == "choice":
        return Distribution(kind, tuple(values))
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        raise ConfigError(f"{kind} is {values!r}: must be two numbers") from None
    if low >= high or (kind == "loguniform" and low <= 0):
        positive = "0 < " if kind == "loguniform" else ""
        raise ConfigError(f"{kind} is {values!r}: needs {positive}low < high")
    return Distribution(kind, (low, high))
