"""From a YAML file and `section.field=value` overrides to a checked `Config`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from clip_ray.config import Config
from clip_ray.errors import ConfigError
from clip_ray.presets import MODEL_PRESETS

Tree = dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path`, lays `overrides` (`optim.lr=1e-3`) over it and checks the whole.

    Raises ConfigError with every mistake in one report.
    """
    tree = read_yaml(Path(path), "sections such as `train:`")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, origin=str(path))


def read_yaml(path: Path, content: str) -> Tree:
    """The mapping that a YAML file holds. Raises ConfigError, which names the wanted `content`."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path}: must hold {content}, not {tree!r}")
    return {str(key): value for key, value in tree.items()}


def parse_config(tree: Tree, origin: str) -> Config:
    """Checks a nested dict, the preset of its model filled in. Raises ConfigError."""
    try:
        return Config.model_validate(_expand_preset(tree))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(_report(origin, lines)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped(place: str) -> Path:
    """A file that is installed with the package: `jobs/configs/shapes.yaml` of a checkout."""
    package = Path(__file__).parent
    in_checkout, installed = package.parent / place, Path(place)
    if in_checkout.exists():
        return in_checkout
    return package / installed.parent.name / installed.name


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`over` laid over `base`, dict by dict; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def set_field(tree: Tree, dotted: str, value: Any) -> None:
    """Sets `section.field` in a nested dict, making the sections on the way."""
    *sections, field = dotted.split(".")
    for section in sections:
        below = tree.get(section)
        if not isinstance(below, dict):
            below = tree[section] = {}
        tree = below
    tree[field] = value


def _apply_override(tree: Tree, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(f"override {override!r}: must read section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    set_field(tree, dotted.strip(), value)


def _expand_preset(tree: Tree) -> Tree:
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return tree
    name = model["preset"]
    if name not in MODEL_PRESETS:
        known = ", ".join(MODEL_PRESETS)
        raise ConfigError(
            f"model.preset is {name!r}: must be one of {known}{_nearest(name, MODEL_PRESETS)}"
        )
    return {**tree, "model": merge(MODEL_PRESETS[name], model)}


def _explain(item: Any) -> str:
    """One pydantic error as `field is value: rule; fix`."""
    dotted = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        siblings = _fields_at(item["loc"][:-1])
        return f"{dotted}: unknown key{_nearest(str(item['loc'][-1]), siblings)}"
    if item["type"] == "missing":
        return f"{dotted}: is missing"
    rule = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{dotted}: {rule}" if dotted else rule
    return f"{dotted} is {item['input']!r}: {rule[0].lower()}{rule[1:]}"


def _fields_at(loc: Sequence[int | str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in loc:
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _report(origin: str, lines: Sequence[str]) -> str:
    head = f"{origin}: {len(lines)} error{'s' if len(lines) > 1 else ''}"
    return "\n".join([head, *(f"  - {line}" for line in lines)])
