"""The report of a run: one HTML file with its curves, its table and its pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from clip_ray.config import Config
from clip_ray.config_file import dump_config

_WIDTH, _HEIGHT = 460, 180
_CURVES = {
    "loss": "loss",
    "exp(logit_scale)": "scale",
    "text→image R@1 on val": "image_retrieval_recall@1",
}


@dataclass(frozen=True)
class Query:
    """A caption, the image it describes, and what it finds: (filename, score, JPEG bytes)."""

    text: str
    filename: str
    hits: list[tuple[str, float, bytes]]


def write_report(
    path: Path,
    config: Config,
    log: Sequence[dict[str, Any]],
    results: dict[str, dict[str, float]],
    queries: Sequence[Query],
) -> None:
    """Writes the page to `path`. It needs nothing beside itself: no script, no network."""
    environment = Environment(autoescape=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    template = resources.files(__package__ or "").joinpath("report.html.j2").read_text()
    page = environment.from_string(template).render(
        config=config,
        config_yaml=dump_config(config),
        curves=[_curve(title, field, log) for title, field in _CURVES.items()],
        width=_WIDTH,
        height=_HEIGHT,
        results=results,
        queries=queries,
    )
    path.write_text(page, encoding="utf-8")


def _curve(title: str, field: str, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A polyline of `field` over the steps, scaled into the picture, its extremes as labels."""
    points = [(entry["step"], entry[field]) for entry in log if field in entry]
    steps, values = [p[0] for p in points] or [0], [p[1] for p in points] or [0]
    low, high = min(values), max(values)
    span, last = (high - low) or 1, steps[-1] or 1
    line = " ".join(
        f"{step / last * _WIDTH:.1f},{_HEIGHT - (value - low) / span * _HEIGHT:.1f}"
        for step, value in points
    )
    return {
        "name": title,
        "line": line,
        "low": low,
        "high": high,
        "last": values[-1],
        "steps": last,
    }
