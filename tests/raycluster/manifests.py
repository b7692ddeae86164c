"""The Kubernetes manifests as they would be applied, and what is wrong with them."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "raycluster" / "kubernetes"
Manifest = dict[str, Any]


def kustomization(folder: str) -> Manifest:
    return yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())


def manifests(folder: str) -> list[Manifest]:
    """All objects that `kubectl apply -k` would make of a folder, by what kustomize does here."""
    rules, found = kustomization(folder), []
    for resource in rules["resources"]:
        path = (KUBERNETES / folder / resource).resolve()
        found += manifests(path.name) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for rule in rules.get("replacements", []):
        spec = next(m["spec"] for m in found if m["kind"] == rule["source"]["kind"])
        for target in rule["targets"]:
            job = next(m for m in found if m["kind"] == target["select"]["kind"])
            job["spec"]["rayClusterSpec"] = copy.deepcopy(spec)
    local = {patch["target"]["kind"] for patch in rules.get("patches", [])}
    found += [config_map(folder, rule) for rule in rules.get("configMapGenerator", [])]
    images = {rule["name"]: rule["newName"] for rule in rules.get("images", [])}
    return [renamed(m, images) for m in found if m["kind"] not in local]


def config_map(folder: str, rule: Manifest) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": rule["name"], "namespace": rule["namespace"]},
        "data": {name: (KUBERNETES / folder / name).read_text() for name in rule["files"]},
    }


def renamed(manifest: Manifest, images: dict[str, str]) -> Manifest:
    for container in containers(manifest):
        name, tag = container["image"].rsplit(":", 1)
        container["image"] = f"{images.get(name, name)}:{tag}"
    return manifest


def containers(part: Any) -> Iterator[Manifest]:
    """Every container of an object, at any depth."""
    if isinstance(part, list):
        for item in part:
            yield from containers(item)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in ("containers", "initContainers"):
                yield from value
            else:
                yield from containers(value)


@cache
def schemas() -> dict[str, Any]:
    """By make_schemas.py, which names their source."""
    return json.loads(gzip.decompress(Path(__file__).with_name("schemas.json.gz").read_bytes()))


def mistakes(manifest: Manifest) -> list[str]:
    """What the schema of its kind says against an object, by the place in it."""
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    schema = schemas()["kinds"][kind] | {"definitions": schemas()["definitions"]}
    errors = Draft7Validator(schema).iter_errors(manifest)
    return [f"{kind} {error.json_path}: {error.message}" for error in errors]
