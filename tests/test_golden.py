"""What users see and depend on, frozen: `make golden` writes it anew, the diff is the review."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_cli import clip_ray

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted((Path(__file__).parent.parent / "jobs" / "configs").glob("*.yaml"))
COMMANDS = [
    "", "demo", "prepare", "quarantine", "train", "checkpoints", "evaluate", "tune",
    "tune-report", "search", "config", "runs", "doctor", "submit", "jobs", "logs", "stop",
    "cluster", "cluster start", "cluster status", "cluster stop",
]  # fmt: skip


def check(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("CLIP_RAY_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{name} changed; if that is meant: make golden"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_resolve_to_what_they_did(path: Path) -> None:
    check(path.name, clip_ray("config", str(path)).stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_what_it_was(command: str) -> None:
    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    shown = clip_ray(*command.split(), "--help", **plain).stdout
    name = command.replace(" ", "-") or "all"
    check(f"help-{name}.txt", "\n".join(map(str.rstrip, shown.splitlines())) + "\n")
