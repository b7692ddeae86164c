"""Space files: what they say, made into a space, with every mistake told before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from clip_ray.config import Config
from clip_ray.config_file import merge, parse_config, read_yaml
from clip_ray.errors import ConfigError
from clip_ray.tuning.space import Distribution, Kind, Scalar, Space, with_values

EXAMPLE = "`space:` with lines such as `optim.lr: {uniform: [0.1, 0.2]}`"
# What a sweep sets itself, or what all trials share.
_NOT_VARIED = ("name", "seed", "start", "storage", "tune")


def read_space(path: Path) -> dict[str, Any]:
    """What a space file holds, for `parse_space`. Raises ConfigError."""
    return read_yaml(path, EXAMPLE)


def parse_space(tree: Mapping[str, Any], config: Config, origin: str) -> tuple[Space, Config]:
    """The fields of a space file, and `config` with the file's `tune` laid under it.

    Raises ConfigError, with every mistake in one report, where the config cannot take a value.
    """
    if unknown := sorted(set(tree) - {"space", "tune"}):
        raise ConfigError(f"{origin}: unknown key {unknown[0]!r}: must hold {EXAMPLE}, and `tune:`")
    texts = tree.get("space")
    if not isinstance(texts, dict) or not texts:
        raise ConfigError(f"{origin}: must hold {EXAMPLE}")
    config = _with_tune(config, tree.get("tune") or {}, origin)
    found, mistakes = _read_fields(texts)
    if not mistakes:
        found, mistakes = _checked_fields(found, config)
    if mistakes:
        count = f"{len(mistakes)} error{'s' if len(mistakes) > 1 else ''}"
        raise ConfigError("\n".join([f"{origin}: {count}", *(f"  - {line}" for line in mistakes)]))
    return Space(found), config


def _with_tune(config: Config, tune: Any, origin: str) -> Config:
    """What the config says itself, by its file or a command, stands above the space file."""
    tree = config.model_dump(mode="json")
    own = config.tune.model_dump(mode="json", exclude_unset=True)
    laid: Any = merge(tune, own) if isinstance(tune, dict) else tune
    # Objectives are one value, not a section to be laid over.
    if isinstance(laid, dict) and "objectives" in own:
        laid["objectives"] = own["objectives"]
    return parse_config(tree | {"tune": laid}, origin=origin)


def _read_fields(texts: Mapping[str, Any]) -> tuple[dict[str, Distribution], list[str]]:
    """The distributions, and what is wrong with their texts."""
    found: dict[str, Distribution] = {}
    mistakes: list[str] = []
    for name, text in texts.items():
        try:
            found[name] = _distribution(text)
        except ConfigError as error:
            mistakes.append(f"{name}: {error}")
    return found, mistakes


def _checked_fields(
    fields: dict[str, Distribution], config: Config
) -> tuple[dict[str, Distribution], list[str]]:
    """Each field after those that it waits for, and what the config has against them."""
    fields, mistakes = _sorted(fields)
    if not mistakes:
        mistakes = [line for name in fields for line in _mistakes_of(name, fields, config)]
        mistakes += _unfit_for(config, fields)
    if not mistakes and config.tune.search == "grid":
        mistakes = _wrong_combinations(fields, config)
    return fields, mistakes


def _distribution(text: Any) -> Distribution:
    known = ", ".join(get_args(Kind))
    when = text.get("when", {}) if isinstance(text, dict) else {}
    kinds = [key for key in text if key != "when"] if isinstance(text, dict) else []
    if len(kinds) != 1 or kinds[0] not in get_args(Kind):
        raise ConfigError(f"{text!r} must be {{kind: values}}, kind one of {known}")
    if not isinstance(when, dict):
        raise ConfigError(f"when is {when!r}: must be {{field: value}} or {{field: [values]}}")
    conditions = {
        str(name): tuple(wanted) if isinstance(wanted, list) else (wanted,)
        for name, wanted in when.items()
    }
    values, step = _values(kinds[0], text[kinds[0]])
    return Distribution(kinds[0], values, step, conditions)


def _values(kind: Kind, values: Any) -> tuple[tuple[Any, ...], float | None]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{kind} is {values!r}: must be a list")
    if kind in ("choice", "grid"):
        for value in values:
            if not isinstance(value, Scalar):
                raise ConfigError(
                    f"{kind} holds {value!r}: must be numbers, words, true, false or null"
                )
        return tuple(values), None
    wanted = "two numbers and a step" if kind == "quniform" else "two numbers"
    try:
        low, high, *rest = map(float, values)
    except (TypeError, ValueError):
        raise ConfigError(f"{kind} is {values!r}: must be {wanted}") from None
    if len(rest) != (kind == "quniform"):
        raise ConfigError(f"{kind} is {values!r}: must be {wanted}")
    if low >= high or (kind == "loguniform" and low <= 0):
        positive = "0 < " if kind == "loguniform" else ""
        raise ConfigError(f"{kind} is {values!r}: needs {positive}low < high")
    if rest and (rest[0] <= 0 or not _is_whole((high - low) / rest[0])):
        raise ConfigError(f"{kind} is {values!r}: high - low must be a multiple of the step")
    if kind == "randint" and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{kind} is {values!r}: must be whole numbers")
    whole = kind == "randint" or (rest and all(n.is_integer() for n in (low, high, *rest)))
    bounds = (int(low), int(high)) if whole else (low, high)
    step = rest[0] if rest else None
    return bounds, int(step) if whole and step else step


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-9


def _sorted(fields: dict[str, Distribution]) -> tuple[dict[str, Distribution], list[str]]:
    """Each field after those that it waits for; what can never be drawn, in lines."""
    mistakes = []
    for name, distribution in fields.items():
        for other, wanted in distribution.when.items():
            if other not in fields:
                mistakes.append(f"{name}: when names {other}, which the space does not vary")
            elif fields[other].kind not in ("choice", "grid"):
                mistakes.append(f"{name}: when names {other}, which is no choice or grid")
            elif missing := [value for value in wanted if value not in fields[other].values]:
                mistakes.append(f"{name}: when wants {other} to be {missing[0]!r}: it never is")
    done: dict[str, Distribution] = {}
    while not mistakes and len(done) < len(fields):
        ready = [n for n, d in fields.items() if n not in done and set(d.when) <= set(done)]
        if not ready:
            stuck = ", ".join(name for name in fields if name not in done)
            mistakes.append(f"when goes round in a circle: {stuck}")
        done |= {name: fields[name] for name in ready}
    return done or fields, mistakes


def _mistakes_of(name: str, fields: dict[str, Distribution], config: Config) -> list[str]:
    """What the config has against the field's values, the first of it."""
    if name.partition(".")[0] in _NOT_VARIED:
        return [f"{name}: a sweep cannot vary it; for several seeds of a point take tune.repeats"]
    conditions = _conditions(name, fields)
    for value in fields[name].probes:
        try:
            with_values(config, conditions | {name: value})
        except ConfigError as error:
            reason = str(error).splitlines()[-1].removeprefix("  - ")
            return [reason if reason.startswith(name) else f"{name}: {reason}"]
    return []


def _wrong_combinations(fields: dict[str, Distribution], config: Config) -> list[str]:
    """Combinations that the config's rules between fields refuse."""
    mistakes = []
    for values in Space(fields).combinations():
        try:
            with_values(config, values)
        except ConfigError as error:
            mistakes.append(f"{values}: {str(error).splitlines()[-1].removeprefix('  - ')}")
    return mistakes


def _conditions(name: str, fields: dict[str, Distribution]) -> dict[str, Scalar]:
    """Values of other fields under which `name` is drawn."""
    found: dict[str, Scalar] = {}
    for other, wanted in fields[name].when.items():
        found |= _conditions(other, fields) | {other: wanted[0]}
    return found


def _unfit_for(config: Config, fields: dict[str, Distribution]) -> list[str]:
    drawn = [name for name, d in fields.items() if d.is_number]
    if config.tune.search == "grid" and drawn:
        kind = fields[drawn[0]].kind
        return [f"{drawn[0]}: is a {kind}: tune.search grid needs grid or choice for each field"]
    if config.tune.scheduler != "pbt":
        return []
    if any(d.when for d in fields.values()):
        return ["when: tune.scheduler pbt perturbs all fields, always; take out the conditions"]
    if not drawn:
        return ["tune.scheduler pbt needs a field with two bounds, to perturb"]
    # What may differ between a run and its fork.
    fixed = [name for name in drawn if name.partition(".")[0] not in ("optim", "loss")]
    return [f"{name}: tune.scheduler pbt changes fields of optim and loss alone" for name in fixed]
