"""Writes schemas.json.gz, by which tests/raycluster check the Kubernetes manifests.

`python tests/raycluster/make_schemas.py FOLDER`, where FOLDER holds these files, all Apache-2.0:

  from https://github.com/ray-project/kuberay, tag v1.7.0, ray-operator/config/crd/bases/:
    ray.io_rayclusters.yaml, ray.io_rayjobs.yaml
  from https://github.com/kubernetes-client/python, tag v36.0.3, kubernetes/:
    swagger.json.unprocessed, which is the OpenAPI document of Kubernetes 1.36

Kept is what says whether a manifest is well formed, without descriptions. As kubeconform does with
-strict, a field that a schema does not name is made an error.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).with_name("schemas.json.gz")
SOURCE = {
    "KubeRay": "https://github.com/ray-project/kuberay v1.7.0",
    "Kubernetes": "https://github.com/kubernetes-client/python v36.0.3 (Kubernetes 1.36)",
    "licence": "Apache-2.0",
}
KINDS = {
    "v1/ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "v1/Namespace": "io.k8s.api.core.v1.Namespace",
    "v1/Service": "io.k8s.api.core.v1.Service",
    "v1/ServiceAccount": "io.k8s.api.core.v1.ServiceAccount",
    "apps/v1/StatefulSet": "io.k8s.api.apps.v1.StatefulSet",
    "networking.k8s.io/v1/NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
}
META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
# In Kubernetes' document these are strings; a number is taken as well.
LOOSE = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["string", "number"]},
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["string", "integer"]},
}
KEPT = {
    "$ref", "type", "properties", "items", "required", "enum", "additionalProperties", "anyOf",
    "pattern", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength",
}  # fmt: skip


def main(folder: Path) -> None:
    """Reads the sources in `folder` and writes SCHEMAS."""
    swagger = json.loads((folder / "swagger.json.unprocessed").read_text())["definitions"]
    kinds = {kind: strict({"$ref": f"#/definitions/{name}"}) for kind, name in KINDS.items()}
    for name in ("rayclusters", "rayjobs"):
        kind, schema = of_crd(yaml.safe_load((folder / f"ray.io_{name}.yaml").read_text()))
        kinds[kind] = schema
    needed = [META, *KINDS.values()]
    definitions: dict[str, Any] = {}
    while needed:
        if (name := needed.pop()) not in definitions:
            definitions[name] = LOOSE.get(name) or strict(swagger[name])
            needed += references(definitions[name])
    text = json.dumps({"source": SOURCE, "kinds": kinds, "definitions": definitions})
    SCHEMAS.write_bytes(gzip.compress(text.encode(), mtime=0))


def of_crd(crd: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A custom resource's kind, and its strict schema."""
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"metadata": {"$ref": f"#/definitions/{META}"}}
    schema["properties"].pop("status")
    return f"{crd['spec']['group']}/v1/{crd['spec']['names']['kind']}", schema


def strict(schema: Any) -> Any:
    """The schema without what checks nothing; objects have the fields it names and no others."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key in KEPT}
    for key in ("items", "additionalProperties"):
        if key in kept:
            kept[key] = strict(kept[key])
    if "anyOf" in kept:
        kept["anyOf"] = [strict(option) for option in kept["anyOf"]]
    if schema.get("x-kubernetes-int-or-string"):
        kept.setdefault("type", ["integer", "string"])
    if "properties" in kept:
        kept["properties"] = {name: strict(field) for name, field in kept["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    return kept


def references(schema: Any) -> list[str]:
    """The definitions that a schema names, at any depth."""
    if isinstance(schema, list):
        return [name for part in schema for name in references(part)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"].removeprefix("#/definitions/")] if "$ref" in schema else []
    return own + references(list(schema.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
