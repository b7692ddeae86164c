"""A run's figures among Ray's metrics, for Prometheus: `ray_clip_ray_loss{run="…"}` and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge


class Gauges:
    """Gauges of a run, one for each figure of a logged step. Needs a Ray session."""

    def __init__(self, run: str) -> None:
        self._run, self._gauges = run, dict[str, Gauge]()

    def set(self, figures: Mapping[str, Any]) -> None:
        """Takes the numbers among `figures`."""
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._gauge(name.replace("@", "_at_")).set(value)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            gauge = Gauge(f"clip_ray_{name}", f"{name} of the run", tag_keys=("run",))
            gauge.set_default_tags({"run": self._run})
            self._gauges[name] = gauge
        return self._gauges[name]
