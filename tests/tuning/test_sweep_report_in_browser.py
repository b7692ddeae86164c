"""The report of a sweep in a real browser: every plot is drawn, and nothing is fetched."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_up_sweep import RECALL, as_asha_leaves_them, made_up_sweep, made_up_trials

from clip_ray.tuning.journal import Trial
from clip_ray.tuning.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTH = 1100
# Where plotly draws into, and whether what it drew is there to be seen.
DRAWN = """plots => plots.map(plot => {
    const marks = plot.querySelectorAll('.scatterlayer path, .barlayer path, .heatmaplayer image');
    const svg = plot.querySelector('svg.main-svg');
    return [plot.id, svg ? svg.getBoundingClientRect().width : 0, marks.length];
})"""
# Of each plot, the labels that lie outside of it.
OUTSIDE = """plots => plots.flatMap(plot => {
    const frame = plot.getBoundingClientRect();
    return [...plot.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1
            || box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
    }).map(text => plot.id + ': ' + text.textContent);
})"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("scheduler", ["asha", "none"])
def test_every_plot_is_drawn(scheduler: str, tmp_path: Path) -> None:
    trials = made_up_trials()
    plots = ["curves", "map", "parallel", "importances"]
    tune: dict[str, Any] = {"scheduler": scheduler}
    if scheduler == "asha":
        trials = as_asha_leaves_them(trials)
    else:
        tune["objectives"] = {RECALL: "max", "images_per_s": "max"}
        plots.insert(2, "pareto")
    sweep, space, config = made_up_sweep(tune)
    path = tmp_path / "report.html"
    write_report(path, sweep, trials, config, space)
    seen = opened(path)
    assert seen["problems"] == []
    assert set(seen["requests"]) <= {"file", "data", "blob"}
    assert [key for key, _, _ in seen["drawn"]] == [f"plot-{key}" for key in plots]
    assert all(0.9 * WIDTH < width <= WIDTH for _, width, _ in seen["drawn"])
    assert all(marks > 0 for _, _, marks in seen["drawn"])
    assert seen["outside"] == []
    assert seen["page_width"] <= WIDTH
    assert seen["best"] == best_of(trials).run


def best_of(trials: list[Trial]) -> Trial:
    finished = [trial for trial in trials if trial.state == "finished"]
    return max(finished, key=lambda trial: trial.figure(RECALL) or -math.inf)


def opened(path: Path) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split(":")[0]))
        page.goto(path.as_uri())
        page.wait_for_function(
            "[...document.querySelectorAll('.plotly-graph-div')]"
            ".every(plot => plot.querySelector('svg.main-svg'))"
        )
        page.wait_for_timeout(300)  # what plotly still moves once the fonts are there
        seen = {
            "drawn": page.eval_on_selector_all(".plotly-graph-div", DRAWN),
            "outside": page.eval_on_selector_all(".plotly-graph-div", OUTSIDE),
            "page_width": page.evaluate("document.documentElement.scrollWidth"),
            "best": page.inner_text("#best-run"),
        }
        browser.close()
    return seen | {"problems": problems, "requests": requests}
