"""What the workers of a run have logged of their samples: a file for each, a line for each step."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


def samples(folder: Path) -> dict[int, list[int]]:
    """The samples of each step, by rank: those of the last attempt that made it."""
    return {
        step: [sample_id for entry in ranks for sample_id in entry["ids"]]
        for step, ranks in _last_attempts(folder).items()
    }


def begun_s(folder: Path) -> dict[int, float]:
    """When each step was begun, of the last attempt that made it."""
    return {step: ranks[0]["at_s"] for step, ranks in _last_attempts(folder).items()}


def wants_memory(folder: Path, pid: int) -> Path:
    """Where this file is, the worker `pid` takes 8 GiB before its next step."""
    return folder / f"wants-memory-{pid}"


def _last_attempts(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What was logged of each step, by rank, its last attempt alone."""
    attempts: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut in mid-line
                entry = json.loads(line)
                by_attempt = attempts.setdefault(entry["step"], {})
                by_attempt.setdefault(entry["attempt"], []).append(entry)
    last = {step: by_attempt[max(by_attempt)] for step, by_attempt in attempts.items()}
    return {
        step: sorted(ranks, key=lambda each: each["rank"]) for step, ranks in sorted(last.items())
    }
