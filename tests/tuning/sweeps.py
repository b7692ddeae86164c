"""Sweeps of small runs for tests: begun through the pipeline, and what they left in Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray
import yaml

from clip_ray.config import Config
from clip_ray.pipeline import tune_model
from clip_ray.tuning.journal import Journal, Sweep, Trial, journal_of
from clip_ray.tuning.space_file import parse_space


def run_sweep(
    config: Config, space: str, say: Callable[[str], None]
) -> tuple[Journal, list[Trial]]:
    """All of a sweep over `space`, YAML's lines; its journal and its trials, the best first."""
    tree = {"space": yaml.safe_load(space)}
    checked, resolved = parse_space(tree, config, origin="test")
    journal = journal_of(resolved)
    sweep = Sweep(config=resolved.model_dump(mode="json"), space=tree)
    return journal, tune_model(journal, sweep, resolved, checked, say)


def placement_groups_left(timeout_s: float) -> list[str]:
    """Those that are still there after so long."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        table = ray.util.placement_group_table()
        left = [pg["placement_group_id"] for pg in table.values() if pg["state"] != "REMOVED"]
        if not left or time.monotonic() > deadline_s:
            return left
        time.sleep(1)
