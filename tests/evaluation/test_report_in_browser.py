"""The report opened in a real browser: pictures load, curves are drawn, nothing is fetched."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from conftest import SHAPES_YAML
from PIL import Image

from clip_ray.config_file import load_config
from clip_ray.evaluation.report import Query, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (72, 72), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_report_is_drawn(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    log = [{"step": s, "loss": 5 / s, "scale": 14.0 + s} for s in range(1, 30)]
    for entry in log[9::10]:
        entry["image_retrieval_recall@1"] = entry["step"] / 40
    results = {"zeroshot_retrieval": {"image_retrieval_recall@1": 0.614}}
    hits = [(f"{colour}.jpg", 0.9, jpeg(colour)) for colour in ("red", "green", "blue")]
    queries = [Query(f"query {number}", "green.jpg", hits) for number in range(12)]
    path = tmp_path / "report.html"
    write_report(path, load_config(SHAPES_YAML), log, results, queries)
    problems: list[str] = []
    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split(":")[0]))
        page.goto(path.as_uri())
        widths = page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth)")
        curves = page.eval_on_selector_all(
            "polyline", "lines => lines.map(l => l.getBoundingClientRect().height)"
        )
        assert page.inner_text("#results").split("\n")[1].split("\t")[-1] == "61.4 %"
        assert page.locator(".hits .own").count() == 12
        browser.close()
    assert problems == []
    assert set(requests) <= {"file", "data"}
    assert widths == [72] * 36
    assert len(curves) == 3
    assert all(height > 100 for height in curves)
