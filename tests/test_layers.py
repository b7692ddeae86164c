"""Imports go down only, and each framework is imported where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "clip_ray"

# The first that fits names the layer; a lower layer imports no higher one.
LAYERS = [
    ("__main__", 11), ("cli", 10), ("demo", 9), ("pipeline", 8), ("cluster", 7), ("tuning", 7),
    ("training", 6),
    ("evaluation.retrieval", 4), ("evaluation", 5), ("search", 4),
    ("model", 3), ("loss", 3), ("data.prepare", 3), ("data", 2), ("collectives", 2),
    ("embedded_s3", 1), ("storage", 1), ("", 0),
]  # fmt: skip

ALLOWED = {
    "ray.data": {"data/prepare", "data/stream", "evaluation/embed", "training/session"},
    "ray.train": {"training/callbacks", "training/launch", "training/worker"},
    "ray.tune": {"tuning/points", "tuning/schedulers", "tuning/sweep", "tuning/trial"},
    "deepspeed": {"training/engine", "training/masters"},
    "torch.distributed": {"collectives"},
    "boto3": {"storage", "cluster/store_checks"},
    "botocore": {"storage", "cluster/store_checks"},
}
WITHOUT_TORCH = {"config/data", "config/fields", "config/model", "config/run",
                 "config/training", "config/tuning", "config_file", "presets",
                 "data/order", "data/transforms", "data/source",
                 "data/layouts", "data/images", "data/records", "data/shapes"}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> dict[str, set[str]]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {str(f.relative_to(PACKAGE).with_suffix("")): imports_of(f) for f in files}


def layer(name: str) -> int:
    fits = (level for start, level in LAYERS if f"{name}.".startswith(f"{start}." if start else ""))
    return next(fits)


def test_imports_go_down_only() -> None:
    for module, imports in modules().items():
        own = layer(module.replace("/", "."))
        for name in imports:
            if name.startswith("clip_ray."):
                other = name.removeprefix("clip_ray.")
                assert layer(other) <= own, f"{module} imports {name}, which stands above it"


def test_frameworks_are_imported_where_they_belong() -> None:
    for module, imports in modules().items():
        for name in imports:
            for framework, allowed in ALLOWED.items():
                if name == framework or name.startswith(f"{framework}."):
                    assert module in allowed, f"{module} imports {name}"
            if name == "torch" or name.startswith("torch."):
                assert module not in WITHOUT_TORCH, f"{module} imports {name}"
            assert not name.startswith(("jobs", "tests", "raycluster")), f"{module} imports {name}"


def test_who_only_asks_a_cluster_does_not_wait_for_torch() -> None:
    code = "import sys, clip_ray.cluster.jobs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_nothing_is_unpickled() -> None:
    for module, imports in modules().items():
        assert not imports & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, module
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in {"torch.load", "np.load", "yaml.load"}, f"{path}: {called}"
