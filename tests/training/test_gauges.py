"""A run's figures are among Ray's metrics, under the names that the Grafana dashboard asks for."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray

DASHBOARD = Path(__file__).parents[2] / "raycluster" / "grafana" / "dashboard.json"
REPORTED_EVERY_S = 10


def dashboard_figures() -> set[str]:
    """The figures of a logged step that the Grafana dashboard shows."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    return {found for expr in shown for found in re.findall(r"ray_clip_ray_(\w+)", expr)}


@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_figures_are_among_rays_metrics() -> None:
    from clip_ray.training.gauges import Gauges

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        Gauges("a-run").set({name: 0.25 for name in dashboard_figures()} | {"rank_names": ["a"]})
        url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
        missing, deadline_s = dashboard_figures(), time.monotonic() + 6 * REPORTED_EVERY_S
        while missing:
            assert time.monotonic() < deadline_s, f"not among Ray's metrics: {missing}"
            time.sleep(1)
            lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
            ours = [line for line in lines if 'run="a-run"' in line and line.endswith(" 0.25")]
            missing -= set(re.findall(r"^ray_clip_ray_(\w+)\{", "\n".join(ours), re.MULTILINE))
    finally:
        ray.shutdown()
